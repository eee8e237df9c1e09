"""From which dataset of a blend each row comes: from the one that is furthest behind its share.

A dataset's share of the first n rows is the sum of its part of the weights over them, also where the weights change on
the way. No dataset is ever a whole row ahead of its share, since the one that gives a row is behind by 1/k at least.
None of k datasets is behind by more than 1/2 + 1/3 + ... + 1/k, which for up to three is less than a row: the j that
are furthest behind are so by 1/(j+1) + ... + 1/k on average at most. (All k are by 0. A row taken from one of the j
does not raise their mean; taken from another, that one was as far behind as each of them, so their mean was at most
that of the j+1, and no row adds more than 1 to their sum.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple


class Weights(NamedTuple):
    """Weights from a row on.

    Attributes:
        first_sample: of the global order; 0 in the first, rising.
        values: one a dataset, not all 0; taken exactly as they are written in decimal (0.7 is 7/10).
    """

    first_sample: int
    values: Sequence[float]


class Mixture:
    """Row -> (dataset, its own row); a pure function of the weights, counted without rounding. Reads on, not back.

    The state is how many rows each dataset has given: from there any mixture goes on at once (``go_to``). A row before
    the state is found from the start again, in about a microsecond a row and dataset.
    """

    def __init__(self, weights: Sequence[Weights]) -> None:
        self._starts = [entry.first_sample for entry in weights]
        exact = [[Fraction(repr(float(value))) for value in entry.values] for entry in weights]
        parts = [[value / sum(values) for value in values] for values in exact]
        # One row is `whole`; a dataset is due its income with each row.
        self._whole = math.lcm(*(part.denominator for row in parts for part in row))
        self._incomes = [[int(part * self._whole) for part in row] for row in parts]
        self._datasets = len(parts[0])
        self.go_to(0, [0] * self._datasets)

    def place(self, sample: int) -> tuple[int, int]:
        """The dataset of row ``sample`` (>= 0), and which of its own rows it is."""
        self._walk(sample)
        dataset = self._next()
        return dataset, self._counts[dataset]

    def counts(self, samples: int) -> list[int]:
        """Rows of each dataset among the first ``samples`` (>= 0)."""
        self._walk(samples)
        return list(self._counts)

    def shares(self, samples: int) -> list[Fraction]:
        """What the weights say of the first ``samples`` rows, by dataset."""
        return [Fraction(due, self._whole) for due in self._due(samples)]

    def may_have_given(self, samples: int, counts: Sequence[int]) -> bool:
        """Whether each dataset's rows of the first ``samples`` are within the bounds of their share."""
        behind = sum(Fraction(1, number) for number in range(2, self._datasets + 1))
        return (
            len(counts) == self._datasets
            and sum(counts) == samples
            and all(-1 < share - count <= behind for share, count in zip(self.shares(samples), counts, strict=True))
        )

    def go_to(self, samples: int, counts: Sequence[int]) -> None:
        """Go on from where the datasets have given ``counts`` of the first ``samples`` rows."""
        self._samples, self._counts = samples, list(counts)
        self._debts = [due - self._whole * count for due, count in zip(self._due(samples), counts, strict=True)]

    def _due(self, samples: int) -> list[int]:
        ends = [*self._starts[1:], samples]
        lengths = [max(0, min(end, samples) - start) for start, end in zip(self._starts, ends, strict=True)]
        return [
            sum(length * income[dataset] for length, income in zip(lengths, self._incomes, strict=True))
            for dataset in range(self._datasets)
        ]

    def _income(self) -> list[int]:
        """Of the next row."""
        return self._incomes[sum(start <= self._samples for start in self._starts) - 1]

    def _next(self) -> int:
        """The dataset of the next row; of several equally far behind the first."""
        income = self._income()
        return max(range(self._datasets), key=lambda dataset: self._debts[dataset] + income[dataset])

    def _walk(self, samples: int) -> None:
        if self._datasets == 1:
            self.go_to(samples, [samples])
        elif samples < self._samples:
            self.go_to(0, [0] * self._datasets)
        while self._samples < samples:
            chosen = self._next()
            self._debts = [debt + income for debt, income in zip(self._debts, self._income(), strict=True)]
            self._debts[chosen] -= self._whole
            self._counts[chosen] += 1
            self._samples += 1
