"""From which dataset of a blend each sample comes: exact shares at every moment, and any moment can be asked for.

The rule is Tijdeman's ("The chairman assignment problem", Discrete Mathematics 32, 1980): with k datasets, a dataset
may be dealt once it is owed at least 1 / (2k - 2) of a sample, and of those the one that would first be owed more than
1 - 1 / (2k - 2) is. Then after any number of samples each dataset's count is within 1 - 1 / (2k - 2) of its weighted
share, also where the weights change on the way. To deal from whichever is owed most does not keep that promise: with
six equal weights for three samples, then a third for each of those left out, then a half for the two still left out,
one of them is owed 4/3.

Weights are whole numbers, so shares are counted without rounding, and while the weights stay the same the deal repeats
after a cycle of as many samples as they sum to. Only one cycle of each stage, and the samples before the next stage,
are dealt one by one; everything else is a multiple of a cycle.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Stage(NamedTuple):
    """Weights from a sample on.

    Attributes:
        first_sample: of the global order; 0 in the first stage, rising.
        weights: whole numbers, one a dataset, not all 0.
    """

    first_sample: int
    weights: tuple[int, ...]


class _Piece(NamedTuple):
    """A stretch of samples that repeats one pattern.

    Attributes:
        first_sample: of the stretch, which goes on until the next piece.
        pattern: uint16 [m]; the dataset of each sample of one round.
        before: int64 [m]; samples of the same dataset earlier in the round.
        counts: int64 [k]; samples of each dataset before the stretch.
        round_counts: int64 [k]; samples of each dataset in one round.
    """

    first_sample: int
    pattern: NDArray[np.uint16]
    before: NDArray[np.int64]
    counts: NDArray[np.int64]
    round_counts: NDArray[np.int64]


class Dealing:
    """Sample -> (dataset, its own sample); a pure function of the stages.

    Args:
        stages: at least one; the weights of each should have no common divisor, as a cycle is as long as their sum.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._datasets = len(stages[0].weights)
        self._pieces: list[_Piece] = []
        self._last_rounds = 0
        _Dealer(stages, self._add).run()
        self._starts = [piece.first_sample for piece in self._pieces]

    def place(self, sample: int) -> tuple[int, int]:
        """The dataset of ``sample`` (>= 0), and which of its own samples it is."""
        piece, rounds, within = self._find(sample)
        dataset = int(piece.pattern[within])
        own = piece.counts[dataset] + rounds * piece.round_counts[dataset] + piece.before[within]
        return dataset, int(own)

    def counts(self, samples: int) -> list[int]:
        """Samples of each dataset among the first ``samples`` (>= 0) of the global order."""
        piece, rounds, within = self._find(samples)
        rest = np.bincount(piece.pattern[:within], minlength=self._datasets)
        return (piece.counts + rounds * piece.round_counts + rest).tolist()

    def _find(self, sample: int) -> tuple[_Piece, int, int]:
        piece = self._pieces[bisect_right(self._starts, sample) - 1]
        return piece, *divmod(sample - piece.first_sample, len(piece.pattern))

    def _add(self, choices: list[int], rounds: int) -> None:
        """Append ``rounds`` repetitions of ``choices``."""
        if not choices:
            return
        pattern = np.array(choices, np.uint16)
        before = np.empty(len(pattern), np.int64)
        for dataset in range(self._datasets):
            own = np.flatnonzero(pattern == dataset)
            before[own] = np.arange(len(own))
        round_counts = np.bincount(pattern, minlength=self._datasets)
        first_sample, counts = 0, np.zeros(self._datasets, np.int64)
        if self._pieces:
            last = self._pieces[-1]
            first_sample = last.first_sample + self._last_rounds * len(last.pattern)
            counts = last.counts + self._last_rounds * last.round_counts
        self._last_rounds = rounds
        self._pieces.append(_Piece(first_sample, pattern, before, counts, round_counts))


class _Dealer:
    """Deals sample by sample, and notices when the deal repeats.

    Everything is counted in ``whole``-ths of a sample, a common multiple of all cycles.

    Args:
        stages: as for ``Dealing``.
        add: takes (pattern, rounds) of one stretch after the other.
    """

    def __init__(self, stages: Sequence[Stage], add: Callable[[list[int], int], None]) -> None:
        self._add = add
        datasets = len(stages[0].weights)
        parts = max(1, 2 * datasets - 2)
        self._whole = math.lcm(parts, *(sum(stage.weights) for stage in stages))
        self._least_owed = self._whole // parts if datasets > 1 else 0
        self._most_owed = self._whole - self._least_owed
        self._ends: list[float] = [*(stage.first_sample for stage in stages[1:]), math.inf]
        self._cycles = [sum(stage.weights) for stage in stages]
        self._income = [
            [weight * (self._whole // cycle) for weight in stage.weights]
            for stage, cycle in zip(stages, self._cycles, strict=True)
        ]
        self._owed = [0] * datasets
        self._sample = 0
        self._deadlines = [self._deadline(dataset, 0) for dataset in range(datasets)]

    def run(self) -> None:
        """Deal every stage, the last one until it repeats."""
        for stage in range(len(self._ends)):
            self._deal_stage(stage)

    def _deal_stage(self, stage: int) -> None:
        end, cycle = self._ends[stage], self._cycles[stage]
        # Up to two cycles before the end, a dataset's next deadline lies within the stage.
        repeatable_until = end - 2 * cycle - 1
        choices: list[int] = []
        seen: dict[tuple[int, ...], int] = {}
        while self._sample < end:
            if len(choices) % cycle == 0 and self._sample <= repeatable_until:
                begin = seen.setdefault(tuple(self._owed), len(choices))
                length = len(choices) - begin
                if length:
                    self._add(choices[:begin], 1)
                    if end == math.inf:
                        self._add(choices[begin:], 1)
                        return
                    further = (int(repeatable_until) - self._sample) // length
                    self._add(choices[begin:], 1 + further)
                    self._skip(stage, further * length)
                    choices, repeatable_until = [], -1
                    continue
            choices.append(self._deal(stage))
        self._add(choices, 1)

    def _deal(self, stage: int) -> int:
        for dataset, income in enumerate(self._income[stage]):
            self._owed[dataset] += income
        candidates = (dataset for dataset, owed in enumerate(self._owed) if owed >= self._least_owed)
        chosen = min(candidates, key=lambda dataset: self._deadlines[dataset])
        self._owed[chosen] -= self._whole
        self._sample += 1
        self._deadlines[chosen] = self._deadline(chosen, stage)
        return chosen

    def _skip(self, stage: int, samples: int) -> None:
        """Go on by a multiple of the deal's period; who receives nothing in this stage keeps his deadline."""
        self._sample += samples
        for dataset, income in enumerate(self._income[stage]):
            if income:
                self._deadlines[dataset] += samples

    def _deadline(self, dataset: int, stage: int) -> float:
        """The sample with which the dataset would be owed more than it may be; the present stage is ``stage``."""
        room, sample = self._most_owed - self._owed[dataset], self._sample
        for number in range(stage, len(self._ends)):
            income, end = self._income[number][dataset], self._ends[number]
            if income and sample + room // income < end:
                return sample + room // income
            if end < math.inf:
                room -= income * (int(end) - sample)
                sample = int(end)
        return math.inf
