"""Mixtures: each dataset keeps to its share at every row, and goes on from any row as if it had not stopped."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.data.mixture import Mixture, Weights


@st.composite
def schedules(draw: st.DrawFn) -> list[Weights]:
    """Up to six datasets and four stretches, some of a few samples only."""
    datasets = draw(st.integers(1, 6))
    value = st.one_of(st.integers(0, 12).map(float), st.sampled_from([0.1, 0.3, 0.7, 1e-3, 0.33333]))
    weights = st.lists(value, min_size=datasets, max_size=datasets).filter(any)
    first, entries = 0, []
    for _ in range(draw(st.integers(1, 4))):
        entries.append(Weights(first, draw(weights)))
        first += draw(st.integers(1, 60))
    return entries


@pytest.mark.slow
@settings(max_examples=150)
@given(schedules())
def test_every_prefix_keeps_to_the_shares(entries: list[Weights]) -> None:
    """Never a whole row ahead; behind at most 1/2 + ... + 1/k, which is under one row for up to three datasets."""
    mixture, datasets = Mixture(entries), len(entries[0].values)
    counts, shares = [0] * datasets, [Fraction(0)] * datasets
    behind = sum(Fraction(1, number) for number in range(2, datasets + 1))
    for sample in range(entries[-1].first_sample + 80):
        values = next(entry.values for entry in reversed(entries) if entry.first_sample <= sample)
        exact = [Fraction(str(value)) for value in values]
        dataset, own = mixture.place(sample)
        assert own == counts[dataset]
        counts[dataset] += 1
        shares = [share + value / sum(exact) for share, value in zip(shares, exact, strict=True)]
        assert all(-1 < share - count <= behind for share, count in zip(shares, counts, strict=True))
        assert mixture.counts(sample + 1) == counts
        assert mixture.shares(sample + 1) == shares
        assert mixture.may_have_given(sample + 1, counts)


@settings(max_examples=100)
@given(schedules(), st.integers(0, 250), st.integers(0, 60))
def test_going_on_from_counts_is_going_straight(entries: list[Weights], stop: int, further: int) -> None:
    straight, resumed = Mixture(entries), Mixture(entries)
    counts = straight.counts(stop)
    resumed.go_to(stop, counts)
    assert [resumed.place(stop + n) for n in range(further)] == [straight.place(stop + n) for n in range(further)]
    assert straight.counts(stop) == counts, "an earlier row is found again"


@settings(max_examples=50)
@given(schedules(), st.integers(1, 100))
def test_a_later_change_leaves_what_came_before(entries: list[Weights], moved: int) -> None:
    changed = [*entries, Weights(entries[-1].first_sample + moved, entries[0].values)]
    assert Mixture(changed).counts(changed[-1].first_sample) == Mixture(entries).counts(changed[-1].first_sample)


def test_weights_are_taken_as_written() -> None:
    # In binary, 0.1 + 0.2 is more than 0.3, and the tie would fall the other way.
    mixture = Mixture([Weights(0, (0.1, 0.2, 0.3))])
    assert mixture.shares(6) == [1, 2, 3]
    assert mixture.counts(6 * 10**4) == [10**4, 2 * 10**4, 3 * 10**4]


def test_a_dataset_without_weight_waits_for_it() -> None:
    mixture = Mixture([Weights(0, (1, 0)), Weights(1000, (1, 1))])
    assert mixture.counts(1000) == [1000, 0]
    assert mixture.counts(2000) == [1500, 500]


@pytest.mark.parametrize(
    ("counts", "possible"),
    [([50, 30, 20], True), ([51, 29, 20], False), ([50, 30], False), ([50, 30, 21], False), ([52, 28, 20], False)],
)
def test_counts_of_other_weights_are_found(counts: list[int], possible: bool) -> None:
    assert Mixture([Weights(0, (5, 3, 2))]).may_have_given(100, counts) is possible


def test_the_order_is_the_same_on_every_machine() -> None:
    # A golden value: another version must not change what a resumed run sees.
    mixture = Mixture([Weights(0, (5, 3, 2))])
    assert [mixture.place(sample)[0] for sample in range(10)] == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]
