"""Resampling: the draws of a plain loop, and intervals that hold what they should."""

from __future__ import annotations

import numpy as np
import pytest

from vpmoe.eval.suites.bootstrap import interval, resampled


@pytest.mark.parametrize("cells", [1, 7, 1 << 20])
def test_the_same_sums_as_a_plain_loop(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are drawn at once."""
    monkeypatch.setattr("vpmoe.eval.suites.bootstrap._CELLS", cells)
    columns = np.random.default_rng(3).integers(0, 9, (3, 5)).astype(float)
    found = resampled(columns, "täsk", resamples=40, seed=7)
    generator = np.random.default_rng([7, *"täsk".encode()])
    for row in found:
        drawn = [int(generator.integers(0, 5)) for _ in range(5)]
        assert row.tolist() == [sum(column[place] for place in drawn) for column in columns]
    assert not np.array_equal(found, resampled(columns, "other", resamples=40, seed=7))
    assert not np.array_equal(found, resampled(columns, "täsk", resamples=40, seed=8))


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    low, high = interval(resampled(values[None], "x")[:, 0] / 400)
    half = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - half, abs=0.02), pytest.approx(values.mean() + half, abs=0.02))
