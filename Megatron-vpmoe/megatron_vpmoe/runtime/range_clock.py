"""A listener for the ranges of a step that splits its time, and upstream's timers as such ranges."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import torch

from megatron_vpmoe.runtime.device import finish, has_gpu
from megatron_vpmoe.runtime.ranges import RangeListener

_UPSTREAM = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "communication",
    "embedding-grads-all-reduce": "communication",
    "non-tensor-parallel-grads-all-reduce": "communication",
    "conditional-embedder-grads-all-reduce": "communication",
}
"""Names of Megatron-Core's own timers, which its schedules and gradient finalisation start and stop."""


class RangeClock:
    """Seconds by range, each second given to the innermost range open.

    Args:
        names: the ranges that are told apart, any other being part of the one around it; None: all.
        wait: wait for the device at every border, so that a range has what it launched; on a GPU that makes a step
            slower than it is. False: a border is an event in the GPU's stream, and nobody waits. ``seconds`` then
            wants a device that has finished.
        now: what tells the seconds where borders are no events; None: the wall.
    """

    def __init__(
        self, names: Collection[str] | None = None, *, wait: bool = True, now: Callable[[], float] | None = None
    ) -> None:
        self._names, self._in_stream, self._now = names, has_gpu() and not wait, now or time.perf_counter
        self._open: list[str] = []
        self._told: list[str] = []
        self._borders: list[tuple[str | None, Any]] = []

    def enter(self, name: str) -> None:
        self._open.append(name)
        if self._is_told(name):
            self._told.append(name)
            self._border()

    def leave(self, name: str) -> None:
        found = self._open.pop()
        # Upstream's timers do not end a range that an error leaves, which then is what is to be told.
        while found != name and self._open and sys.exc_info()[0] is not None:
            self._drop(found)
            found = self._open.pop()
        if found != name:
            raise ValueError(f"range {name!r} ends inside {found!r}")
        self._drop(name)

    def _drop(self, name: str) -> None:
        if self._is_told(name):
            self._told.pop()
            self._border()

    @property
    def seconds(self) -> dict[str, float]:
        """By range, of those that have ended."""
        spent: dict[str, float] = {}
        for (name, begin), (_, end) in pairwise(self._borders):
            if name is not None:
                took = begin.elapsed_time(end) / 1e3 if self._in_stream else end - begin
                spent[name] = spent.get(name, 0.0) + took
        return spent

    def _is_told(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _border(self) -> None:
        """From here on time belongs to what is innermost now."""
        now: Any
        if self._in_stream:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            finish()
            now = self._now()
        self._borders.append((self._told[-1] if self._told else None, now))


class _Timer:
    """One of Megatron-Core's timers; without a name it is no range of ours."""

    def __init__(self, listener: RangeListener, name: str | None) -> None:
        self._listener, self._name = listener, name

    def start(self, barrier: bool = False) -> None:
        if self._name is not None:
            self._listener.enter(self._name)

    def stop(self, barrier: bool = False) -> None:
        if self._name is not None:
            self._listener.leave(self._name)


class UpstreamTimers:
    """What Megatron-Core asks for as ``config.timers``: its timers become ranges of ``listener``."""

    def __init__(self, listener: RangeListener) -> None:
        self._listener = listener

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return _Timer(self._listener, _UPSTREAM.get(name))
