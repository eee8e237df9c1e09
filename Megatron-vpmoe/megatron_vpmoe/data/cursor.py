"""The global order of samples: row number ``consumed_samples`` of a run, whatever the ranks and micro-batches are.

Every epoch is a fresh permutation of the conversations, cut into windows of a few thousand; each window is packed on
its own and its rows are shuffled. The order is therefore a pure function of (lengths, seq_length, window, seed), and
the cursor of a run is one integer.

Windows are packed when they are reached. A run that resumes packs those it skips as well, since only packing tells how
many rows they gave: some 10 s for each million conversations behind the cursor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.data.packing import fit_companion_minimum, pack

_KEPT_WINDOWS = 3


class SamplePlace(NamedTuple):
    """Where a sample comes from.

    Attributes:
        epoch: passes over the dataset completed before it.
        window: within the epoch.
        row: within the window.
    """

    epoch: int
    window: int
    row: int


class SampleOrder:
    """Which conversations share which row, and which row comes when; endless.

    Not to be shared by threads: it packs and remembers windows as they are asked for.

    Args:
        lengths: int32 [n]; tokens of each conversation, each at most ``seq_length``.
        seq_length: positions of a row.
        window: conversations packed together; the last window of an epoch takes the remainder as well.
        seed: of the order.
    """

    def __init__(self, lengths: NDArray[np.int32], *, seq_length: int, window: int, seed: int) -> None:
        self._lengths, self._seq_length, self._window, self._seed = lengths, seq_length, window, seed
        self._companion_minimum = fit_companion_minimum(lengths, seq_length)
        self._windows_per_epoch = max(1, len(lengths) // window)
        self._first_sample = [0]
        self._packed: OrderedDict[int, list[NDArray[np.int64]]] = OrderedDict()
        self._permutation = lru_cache(maxsize=1)(lambda epoch: shuffled(len(lengths), seed, epoch))

    def documents(self, sample: int) -> NDArray[np.int64]:
        """The conversations in row ``sample`` of the global order, sample >= 0; int64 [documents]."""
        number = self._window_of(sample)
        return self._rows(number)[sample - self._first_sample[number]]

    def place(self, sample: int) -> SamplePlace:
        """Epoch, window and row of a sample, for messages."""
        number = self._window_of(sample)
        epoch, window = divmod(number, self._windows_per_epoch)
        return SamplePlace(epoch, window, sample - self._first_sample[number])

    def first_sample_of_epoch(self, epoch: int) -> int:
        """The sample with which an epoch begins; packs everything before it."""
        number = epoch * self._windows_per_epoch
        while len(self._first_sample) <= number:
            self._extend()
        return self._first_sample[number]

    def _window_of(self, sample: int) -> int:
        while self._first_sample[-1] <= sample:
            self._extend()
        return bisect_right(self._first_sample, sample) - 1

    def _extend(self) -> None:
        number = len(self._first_sample) - 1
        self._first_sample.append(self._first_sample[-1] + len(self._rows(number)))

    def _rows(self, number: int) -> list[NDArray[np.int64]]:
        if number in self._packed:
            self._packed.move_to_end(number)
            return self._packed[number]
        epoch, window = divmod(number, self._windows_per_epoch)
        begin = window * self._window
        end = begin + self._window if window + 1 < self._windows_per_epoch else len(self._lengths)
        documents = self._permutation(epoch)[begin:end]
        rows = pack(self._lengths[documents], self._seq_length, companion_minimum=self._companion_minimum)
        # Packing takes the longest first; an unshuffled window would begin with rows of one long conversation.
        rows = [documents[rows[place]] for place in shuffled(len(rows), self._seed, epoch, window)]
        self._packed[number] = rows
        if len(self._packed) > _KEPT_WINDOWS:
            self._packed.popitem(last=False)
        return rows


def shuffled(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that depends on ``key`` alone.

    The numbers are sorted by a 64-bit hash (SplitMix64's finaliser) of themselves and the key: unlike the streams of
    numpy's generators, which may change between releases, the order is the same under every version.

    Returns:
        int64 [count].
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64(part))
    return np.argsort(_mix(state + np.arange(count, dtype=np.uint64)), kind="stable")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # SplitMix64 (Steele, Lea and Flood 2014): add the golden ratio, then two rounds of xor-shift and multiply.
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
