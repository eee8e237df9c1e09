"""A polite stop: SIGTERM and SIGINT ask the loop to finish its step, write a checkpoint and exit 0."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_vpmoe.runtime.device import current_device


class StopRequest:
    """Remembers that a stop was asked for, until the loop looks between two steps.

    A second SIGINT ends the process the usual way, for the impatient.
    """

    def __init__(self) -> None:
        self._requested = 0

    def install(self) -> StopRequest:
        """Take over SIGTERM and SIGINT of this process (main thread only)."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = signum

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective, so that all ranks stop after the same step."""
        flag = torch.tensor([self._requested], device=current_device())
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
