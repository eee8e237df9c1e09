"""The global order of samples: row number ``consumed_samples`` of a run, whatever the ranks and micro-batches are.

Every epoch is a fresh permutation of the conversations, cut into windows of a few thousand; each window is packed on
its own and its rows are shuffled. The order is therefore a pure function of (lengths, seq_length, window, seed), and
the cursor of a run is one integer.

Windows are packed when they are reached, and only packing tells how many rows they give. So a run notes where the
window of its cursor begins (``WindowStart``), stores it with its checkpoint and goes on from there at once. Without
that note the windows behind the cursor are packed again, some 10 s for each million conversations.
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
_HASHED_AT_ONCE = 1 << 20


class WindowStart(NamedTuple):
    """Where a window begins.

    Attributes:
        window: counted over all epochs.
        first_sample: rows of all windows before it.
    """

    window: int
    first_sample: int


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
        self._first_window, self._first_sample = 0, [0]
        self._packed: OrderedDict[int, list[NDArray[np.int64]]] = OrderedDict()
        self._permutation = lru_cache(maxsize=1)(lambda epoch: Shuffle(len(lengths), seed, epoch))

    def documents(self, sample: int) -> NDArray[np.int64]:
        """The conversations in row ``sample`` of the global order, sample >= 0; int64 [documents]."""
        start = self._window_of(sample)
        return self._rows(start.window)[sample - start.first_sample]

    def start_of(self, sample: int) -> WindowStart:
        """The window that holds ``sample``; packs nothing if the sample before it has been read."""
        if sample != self._first_sample[0]:
            self._reach(sample - 1)
        return self._known_start(sample)

    def go_to(self, start: WindowStart, sample: int) -> None:
        """Go on from a window that ``start_of(sample)`` named, in this run or an earlier one of the same order.

        Raises:
            ValueError: ``sample`` does not lie in the window that begins there.
        """
        if sample != start.first_sample:
            end = start.first_sample + len(self._rows(start.window))
            if not start.first_sample < sample < end:
                raise ValueError(f"window {start.window} is samples {start.first_sample} to {end - 1}, not {sample}")
        self._first_window, self._first_sample = start.window, [start.first_sample]

    def epoch_of(self, start: WindowStart) -> int:
        """Passes over the dataset completed before a window."""
        return start.window // self._windows_per_epoch

    def first_sample_of_epoch(self, epoch: int) -> int:
        """The sample with which an epoch begins; packs everything before it."""
        number = epoch * self._windows_per_epoch
        if number < self._first_window:
            self._start_over()
        while len(self._first_sample) <= number - self._first_window:
            self._extend()
        return self._first_sample[number - self._first_window]

    def _window_of(self, sample: int) -> WindowStart:
        self._reach(sample)
        return self._known_start(sample)

    def _reach(self, sample: int) -> None:
        """Know the windows up to the one that holds ``sample``."""
        if sample < self._first_sample[0]:
            self._start_over()
        while self._first_sample[-1] <= sample:
            self._extend()

    def _known_start(self, sample: int) -> WindowStart:
        number = bisect_right(self._first_sample, sample) - 1
        return WindowStart(self._first_window + number, self._first_sample[number])

    def _start_over(self) -> None:
        self._first_window, self._first_sample = 0, [0]

    def _extend(self) -> None:
        number = self._first_window + len(self._first_sample) - 1
        self._first_sample.append(self._first_sample[-1] + len(self._rows(number)))

    def _rows(self, number: int) -> list[NDArray[np.int64]]:
        if number in self._packed:
            self._packed.move_to_end(number)
            return self._packed[number]
        epoch, window = divmod(number, self._windows_per_epoch)
        begin = window * self._window
        end = begin + self._window if window + 1 < self._windows_per_epoch else len(self._lengths)
        documents = self._permutation(epoch).between(begin, end)
        rows = pack(self._lengths[documents], self._seq_length, companion_minimum=self._companion_minimum)
        # Packing takes the longest first; an unshuffled window would begin with rows of one long conversation.
        rows = [documents[rows[place]] for place in shuffled(len(rows), self._seed, epoch, window)]
        self._packed[number] = rows
        if len(self._packed) > _KEPT_WINDOWS:
            self._packed.popitem(last=False)
        return rows


class Shuffle:
    """A permutation of ``range(count)`` that depends on ``key`` alone, for reading in stretches.

    The numbers are sorted by a 64-bit hash (SplitMix64's finaliser) of themselves and the key: unlike the streams of
    numpy's generators, which may change between releases, the order is the same under every version. The hash is a
    bijection, so no two are equal. All numbers are sorted by its leading 16 bits, which is fast; by the rest only those
    that are asked for.
    """

    def __init__(self, count: int, *key: int) -> None:
        self._state = np.zeros(1, np.uint64)
        for part in key:
            self._state = _mix(self._state + np.uint64(part))
        leading = np.empty(count, np.uint16)
        for begin in range(0, count, _HASHED_AT_ONCE):
            numbers = np.arange(begin, min(begin + _HASHED_AT_ONCE, count), dtype=np.uint64)
            leading[begin : begin + len(numbers)] = self._hash(numbers) >> np.uint64(48)
        self._by_leading = np.argsort(leading, kind="stable")
        self._ends = np.cumsum(np.bincount(leading, minlength=1 << 16))

    def between(self, begin: int, end: int) -> NDArray[np.int64]:
        """Places ``begin`` to ``end`` of the permutation, 0 <= begin <= end <= count; int64 [end - begin]."""
        if begin == end:
            return np.empty(0, np.int64)
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right")
        low = int(self._ends[first - 1]) if first else 0
        numbers = self._by_leading[low : int(self._ends[last])]
        numbers = numbers[np.argsort(self._hash(numbers.astype(np.uint64)))]
        return numbers[begin - low : end - low]

    def _hash(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return _mix(self._state + numbers)


def shuffled(count: int, *key: int) -> NDArray[np.int64]:
    """All of a ``Shuffle``; int64 [count]."""
    return Shuffle(count, *key).between(0, count)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # SplitMix64 (Steele, Lea and Flood 2014): add the golden ratio, then two rounds of xor-shift and multiply.
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
