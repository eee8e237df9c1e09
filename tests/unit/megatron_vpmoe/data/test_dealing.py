"""Dealing: shares that are exact at every moment, and the same from whichever moment one begins."""

from __future__ import annotations

import time
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.data.dealing import Dealing, Stage


@st.composite
def schedules(draw: st.DrawFn) -> list[Stage]:
    """Up to six datasets and four stages, some of a few samples only."""
    datasets = draw(st.integers(1, 6))
    weights = st.lists(st.integers(0, 12), min_size=datasets, max_size=datasets).filter(any).map(tuple)
    first, stages = 0, []
    for _ in range(draw(st.integers(1, 4))):
        stages.append(Stage(first, draw(weights)))
        first += draw(st.integers(1, 150))
    return stages


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_counts_stay_within_one_of_the_weighted_share(stages: list[Stage]) -> None:
    dealing, datasets = Dealing(stages), len(stages[0].weights)
    counts, shares = [0] * datasets, [Fraction(0)] * datasets
    bound = 1 - Fraction(1, 2 * datasets - 2) if datasets > 1 else 0
    for sample in range(stages[-1].first_sample + 120):
        weights = next(stage.weights for stage in reversed(stages) if stage.first_sample <= sample)
        dataset, own = dealing.place(sample)
        assert own == counts[dataset]
        counts[dataset] += 1
        shares = [share + Fraction(weight, sum(weights)) for share, weight in zip(shares, weights, strict=True)]
        assert max(abs(share - count) for share, count in zip(shares, counts, strict=True)) <= bound < 1
        assert dealing.counts(sample + 1) == counts


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(0, 10**12))
def test_any_moment_can_be_asked_for_at_once(stages: list[Stage], sample: int) -> None:
    dealing = Dealing(stages)
    before, after = dealing.counts(sample), dealing.counts(sample + 1)
    dataset, own = dealing.place(sample)
    assert sum(before) == sample
    assert own == before[dataset]
    assert after == [count + (number == dataset) for number, count in enumerate(before)]


def test_changes_that_mislead_a_dealer_who_does_not_look_ahead() -> None:
    # Dealt by the largest debt, ties to the first, two datasets end up with 1/2 + 1/3 + 1/2 each and one sample.
    stages = [Stage(0, (1, 1, 1, 1, 1, 1)), Stage(3, (0, 0, 0, 1, 1, 1)), Stage(4, (0, 0, 0, 0, 1, 1))]
    shares = [Fraction(1, 2)] * 3 + [Fraction(5, 6)] + [Fraction(4, 3)] * 2
    counts = Dealing(stages).counts(5)
    assert max(abs(share - count) for share, count in zip(shares, counts, strict=True)) < 1


def test_a_dataset_without_weight_waits_for_its_stage() -> None:
    dealing = Dealing([Stage(0, (1, 0)), Stage(1000, (1, 1))])
    assert dealing.counts(1000) == [1000, 0]
    assert dealing.counts(2000) == [1500, 500]


def test_a_long_schedule_of_fine_weights_opens_in_a_moment() -> None:
    started = time.process_time()
    stages = [Stage(number * 10**7, (9000 - number, 999 + number, 1)) for number in range(3)]
    assert sum(Dealing(stages).counts(10**9)) == 10**9
    # 0.4 s on the machine this was written on.
    assert time.process_time() - started < 5


def test_the_deal_is_the_same_on_every_machine() -> None:
    # A golden value: another version must not change what a resumed run sees.
    dealing = Dealing([Stage(0, (5, 3, 2))])
    assert [dealing.place(sample)[0] for sample in range(10)] == GOLDEN


GOLDEN = [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
