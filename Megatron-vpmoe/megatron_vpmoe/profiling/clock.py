"""Listeners for the ranges of a step: a clock that splits its time, and marks in traces."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron_vpmoe.runtime.device import finish

RANGES = (
    "forward",
    "attention",
    "feed_forward",
    "dispatch",
    "router",
    "experts",
    "shared_expert",
    "loss",
    "backward",
    "optimizer",
    "communication",
)
"""The ranges of a step, as the summary names them; what is in none of them is "other". Those between "forward" and
"backward" are parts of the forward pass, and "forward" is what they leave of it."""

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
    """Seconds by range, each second given to the innermost range open; the device is waited for at every border.

    On a GPU the waiting makes a step slower than it is; ``tokens_per_second`` is therefore measured without a clock.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> None:
        self._settle()
        self._open.append(name)

    def leave(self, name: str) -> None:
        self._settle()
        found = self._open.pop()
        if found != name:
            raise ValueError(f"range {name!r} ends inside {found!r}")

    def _settle(self) -> None:
        finish()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class TraceMarks:
    """Each range as an entry of torch's trace and, on a GPU, as an NVTX range for Nsight Systems."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def enter(self, name: str) -> None:
        mark = torch.profiler.record_function(name)
        mark.__enter__()
        self._open.append(mark)
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)

    def leave(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()
        self._open.pop().__exit__(None, None, None)


class _Timer:
    """One of Megatron-Core's timers; without a name it is no range of ours."""

    def __init__(self, listener: Any, name: str | None) -> None:
        self._listener, self._name = listener, name

    def start(self, barrier: bool = False) -> None:
        if self._name is not None:
            self._listener.enter(self._name)

    def stop(self, barrier: bool = False) -> None:
        if self._name is not None:
            self._listener.leave(self._name)


class UpstreamTimers:
    """What Megatron-Core asks for as ``config.timers``: its timers become ranges of ``listener``."""

    def __init__(self, listener: Any) -> None:
        self._listener = listener

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return _Timer(self._listener, _UPSTREAM.get(name))
