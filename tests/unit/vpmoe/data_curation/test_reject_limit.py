"""A source within the limit is practically never stopped on its way, one far over it early, and the end is exact."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from vpmoe.data_curation.reject_limit import RejectLimit
from vpmoe.errors import DataError

LIMIT = 0.001


def first_refusal(limit: RejectLimit, rate: float, rows: int, seed: int) -> int | None:
    """Row at which a stream with bad rows at ``rate`` is refused; looked at after each bad row, as builders do."""
    return next((seen for count, seen in bad_rows(rate, rows, seed) if limit.exceeded(count, seen)), None)


def bad_rows(rate: float, rows: int, seed: int) -> Iterator[tuple[int, int]]:
    """How many rows were bad, and how many seen, at each bad row of a stream."""
    bad = np.flatnonzero(np.random.default_rng(seed).random(rows, dtype=np.float32) < rate)
    return enumerate((bad + 1).tolist(), 1)


def test_half_the_limit_is_never_stopped_however_long():
    seeds = range(200)
    by_count_alone = sum(
        any(seen >= 1000 and count > LIMIT * seen for count, seen in bad_rows(LIMIT / 2, 300_000, seed))
        for seed in seeds
    )
    assert by_count_alone > 50  # the streams are no easy ones
    assert [first_refusal(RejectLimit(LIMIT), LIMIT / 2, 300_000, seed) for seed in seeds] == [None] * 200


@pytest.mark.slow
@pytest.mark.parametrize("limit", [LIMIT, 0.02, 0.2])
def test_at_the_limit_no_more_than_the_stated_chance_is_stopped(limit: float):
    """With an alpha that can be counted: 0.05 of streams whose rate is the limit itself."""
    stopped = sum(first_refusal(RejectLimit(limit, alpha=0.05), limit, 20_000, seed) is not None for seed in range(300))
    # Four standard deviations above the stated chance.
    assert stopped <= 300 * 0.05 + 4 * (300 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize(("limit", "soon"), [(LIMIT, 40_000), (0.02, 3_000), (0.3, 1_010)])
def test_three_times_the_limit_is_stopped_early(limit: float, soon: int):
    rows = [first_refusal(RejectLimit(limit), 3 * limit, 20 * soon, seed) for seed in range(50)]
    assert all(row is not None and row <= soon for row in rows), rows


def test_all_bad_is_stopped_at_the_first_look_also_where_the_limit_is_near_one():
    assert first_refusal(RejectLimit(LIMIT), 1.0, 5_000, 0) == 1_000
    assert first_refusal(RejectLimit(0.98), 1.0, 5_000, 0) is not None


def test_a_few_bad_rows_at_the_beginning_say_nothing():
    assert not any(RejectLimit(LIMIT).exceeded(count, count) for count in range(1, 1000))


def test_the_end_is_exact():
    assert not RejectLimit(LIMIT).exceeded(10, 10_000, final=True)
    assert RejectLimit(LIMIT).exceeded(11, 10_000, final=True)
    assert not RejectLimit(LIMIT).exceeded(11, 10_000)


def test_more_than_the_whole_source_may_have_is_enough():
    assert RejectLimit(LIMIT).exceeded(3, 500, total=2_000)
    assert not RejectLimit(LIMIT).exceeded(2, 500, total=2_000)


def test_no_limit_and_limit_zero():
    assert not RejectLimit(None).exceeded(10_000, 10_000, final=True)
    assert RejectLimit(0.0).exceeded(1, 1)
    assert not RejectLimit(1.0).exceeded(2_000, 2_000, final=True)


def test_a_refusal_names_counts_reasons_and_the_way_on():
    with pytest.raises(DataError, match=r"12 of 10000 rows were rejected.*0\.001.*nul 8, empty_field 4") as caught:
        RejectLimit(LIMIT).check({"empty_field": 4, "nul": 8}, 10_000, source="out/rejects.jsonl", final=True)
    assert "rejects.jsonl" in str(caught.value) and "goes on from here" in str(caught.value)


def test_a_fraction_is_a_fraction():
    with pytest.raises(DataError, match="max-reject-fraction"):
        RejectLimit(1.5)
