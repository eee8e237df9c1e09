"""Best-fit packing of whole conversations into rows of ``capacity`` positions.

A row is opened with the longest conversation left and closed with whatever fills it best: one conversation, or a pair
whose sum comes closest to the space left. Plain best-fit-decreasing looks at one conversation at a time; at a typical
length of 0.4 rows it leaves 4 % of SYNTH's positions empty, where looking at pairs leaves under 2 %.

Pairs are precious, though: they spend the short conversations that make triples of middling ones possible. So a row
whose longest conversation can be accompanied by one of at least ``companion_minimum`` tokens is closed as a couple even
with a gap. Where that threshold lies depends on the length distribution; ``fit_companion_minimum`` finds it by trial.

Speed: lengths are small integers, so the multiset of lengths left is a bit mask (bit l set: length l is in stock), and
"largest length up to r" or "all pairs that sum to exactly s" are a few operations on one 2,048-bit integer.

Everything here is a pure function of its arguments. Randomness breaks ties among equally good pairs only and comes from
generators with fixed seeds.
"""

from __future__ import annotations

from collections import defaultdict
from random import Random

import numpy as np
from numpy.typing import NDArray

NEARLY_FULL = 2
"""Empty positions below which a search for a better fill does not pay."""

_SAMPLE = 4096
_LEAST_ATTEMPTS, _MOST_ATTEMPTS = 4, 64


class _Stock:
    """The lengths not packed yet."""

    def __init__(self, lengths: NDArray[np.int32], capacity: int) -> None:
        self._capacity = capacity
        self._counts = np.bincount(lengths, minlength=capacity + 1).tolist()
        self.mask = 0
        self._mirror = 0
        for length in np.unique(lengths).tolist():
            self.mask |= 1 << length
            self._mirror |= 1 << (capacity - length)

    def take(self, length: int) -> None:
        self._counts[length] -= 1
        if not self._counts[length]:
            self.mask ^= 1 << length
            self._mirror ^= 1 << (self._capacity - length)

    def largest(self, limit: int) -> int:
        """The largest length up to ``limit``; -1 where there is none."""
        return (self.mask & ((1 << (limit + 1)) - 1)).bit_length() - 1

    def best_pair(self, limit: int, above: int, chance: Random) -> tuple[int, int] | None:
        """Two lengths with the largest sum up to ``limit``, if one over ``above`` exists."""
        for total in range(limit, above, -1):
            # Bit a of the shifted mirror says that total - a is in stock.
            candidates = self.mask & (self._mirror >> (self._capacity - total)) & ((1 << total) - 1)
            if total % 2 == 0 and self._counts[total // 2] == 1:
                candidates &= ~(1 << (total // 2))
            if candidates:
                # Varied pairs leave a varied stock; always taking the most unequal ones packs worse in the end.
                lowest, end = (candidates & -candidates).bit_length() - 1, candidates.bit_length()
                limit = lowest + 1 + int(chance.random() * (end - lowest))
                first = (candidates & ((1 << limit) - 1)).bit_length() - 1
                return first, total - first
        return None


def _pack_once(lengths: NDArray[np.int32], capacity: int, companion_minimum: int, chance: Random) -> list[list[int]]:
    """Rows as lists of lengths."""
    stock = _Stock(lengths, capacity)
    rows: list[list[int]] = []
    while stock.mask:
        row = [stock.largest(capacity)]
        stock.take(row[0])
        free = capacity - row[0]
        while (single := stock.largest(free)) > 0:
            accepted = (single,)
            couple = len(row) == 1 and single >= companion_minimum
            # With room for more than two of the largest there is no closing pair yet.
            if not couple and free - single > NEARLY_FULL and free <= 2 * single:
                accepted = stock.best_pair(free, single, chance) or accepted
            for length in accepted:
                stock.take(length)
                row.append(length)
                free -= length
        rows.append(row)
    return rows


def fit_companion_minimum(lengths: NDArray[np.int32], capacity: int) -> int:
    """The threshold that packs these lengths into the fewest rows; tried on 4,096 of them or so, in about 0.4 s.

    Args:
        lengths: int32 [n], 1 <= length <= capacity; any order.
        capacity: positions of a row.

    Returns:
        a length between 0 (close every row that a single conversation can join) and about capacity / 2.
    """
    sample = np.sort(lengths)[:: max(1, len(lengths) // _SAMPLE)]

    def score(threshold: int) -> tuple[int, int, int]:
        # Among equally many rows, the emptier the emptiest, the nearer is one row less.
        rows = _pack_once(sample, capacity, threshold, Random(0))
        return len(rows), min(sum(row) for row in rows), threshold

    step = max(1, capacity // 64)
    best = min(score(threshold) for threshold in [0, *range(capacity // 4, capacity // 2 + 1, step)])
    while best[-1] and step > max(1, capacity // 1024):
        step = max(1, step // 2)
        best = min(best, *(score(best[-1] + offset) for offset in (-step, step)))
    return best[-1]


def pack(lengths: NDArray[np.int32], capacity: int, *, companion_minimum: int) -> list[list[int]]:
    """Distribute conversations over as few rows as can be found.

    Args:
        lengths: int32 [n], 1 <= length <= capacity.
        capacity: positions of a row.
        companion_minimum: from ``fit_companion_minimum``; any value gives a valid packing. Values around it are tried
            too, the more the fewer conversations there are.

    Returns:
        rows of indices into ``lengths``; each index occurs once, and no row's lengths sum to more than ``capacity``.
    """
    if not len(lengths):
        return []
    perfect = -(-int(lengths.sum(dtype=np.int64)) // capacity)
    # A row saved weighs more among few rows, and few are quickly packed again.
    attempts = min(_MOST_ATTEMPTS, max(_LEAST_ATTEMPTS, (2 * _SAMPLE // len(lengths)) ** 2))
    step = max(1, capacity // 512)
    best: list[list[int]] | None = None
    for attempt in range(attempts):
        threshold = max(0, companion_minimum + (0, step, -step)[attempt % 3])
        rows = _pack_once(lengths, capacity, threshold, Random(attempt))
        if best is None or len(rows) < len(best):
            best = rows
        if len(best) == perfect:
            break
    assert best is not None
    waiting: defaultdict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths.tolist()):
        waiting[length].append(index)
    return [[waiting[length].pop() for length in row] for row in best]
