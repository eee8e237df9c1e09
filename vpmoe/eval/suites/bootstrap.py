"""How much a number would vary with other items of the same kind: resampled with replacement, always the same way."""

from __future__ import annotations

import numpy as np

RESAMPLES, SEED = 10_000, 1337
_CELLS = 1 << 20  # items drawn at once: a few MB


def resampled(columns: np.ndarray, name: str, *, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Sums over items drawn with replacement, as many as there are.

    Args:
        columns: float64 [C, N], of each item.
        name: of the task; with ``seed`` it decides what is drawn, so that another task changes nothing here.
        resamples: how often.
        seed: of the draws.

    Returns:
        float64 [resamples, C].
    """
    count, items = columns.shape
    generator = np.random.default_rng([seed, *name.encode()])
    sums = np.empty((resamples, count))
    step = max(1, _CELLS // items)
    for first in range(0, resamples, step):
        draws = generator.integers(0, items, (min(step, resamples - first), items))
        sums[first : first + len(draws)] = columns[:, draws].sum(-1).T
    return sums


def interval(drawn: np.ndarray) -> list[float]:
    """The 95 % percentile interval of resampled numbers [resamples]."""
    low, high = np.quantile(drawn, (0.025, 0.975))
    return [float(low), float(high)]
