"""The ranges of a step as profiles name them, and a listener that marks them in traces."""

from __future__ import annotations

from typing import Any

import torch

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
