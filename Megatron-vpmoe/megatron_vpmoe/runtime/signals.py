"""A polite stop: SIGTERM and SIGINT ask the loop to leave what it is at, write a checkpoint and exit 0."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from types import FrameType
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.device import current_device

T = TypeVar("T")

_SECONDS_BETWEEN_QUESTIONS = 1.0


class Interrupted(Exception):
    """All ranks leave what they are at, together: one of them was asked to stop, or has met the error that is the cause
    (``__cause__``)."""


class Stop(Protocol):
    """What long work asks whether it is to end."""

    def is_requested(self) -> bool:
        """Whether this rank was asked to stop."""
        ...

    def agreed(self) -> bool:
        """Whether any rank was asked to stop, as far as the others do not hear of it otherwise."""
        ...


class StopRequest:
    """Remembers that a stop was asked for, until all ranks have agreed on it.

    A second SIGINT ends the process at once, for the impatient.
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
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._requested = signum

    def is_requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._requested > 0

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective, so that all ranks stop after the same step."""
        return self._of_all_ranks()[0] > 0

    def check(self) -> Callable[[], None]:
        """A function to call before each of many like pieces of work, as often on each rank; a collective.

        It raises ``Interrupted`` on all ranks before the same piece, about a second after a rank was asked to stop:
        the ranks ask each other every so many calls, which all of them know from the slowest one's time.
        """
        every = left = 1
        since = time.monotonic()

        def ask() -> None:
            nonlocal every, left, since
            left -= 1
            if left > 0:
                return
            now = time.monotonic()
            requested, seconds = self._of_all_ranks((now - since) / every)
            if requested:
                raise Interrupted
            # No more than doubled: the first piece may have been an easy one.
            every = left = max(1, min(2 * every, int(_SECONDS_BETWEEN_QUESTIONS / max(seconds, 1e-9))))
            since = now

        return ask

    def results(self, futures: Sequence[Future[T]]) -> list[T]:
        """What threads work on beside this one, once those of all ranks are done; a collective.

        The ranks ask each other once a second: none waits longer within one collective, however slow another is.

        Raises:
            Interrupted: on all ranks together, soon after one was asked to stop, or from what a thread of one has
                ended with. What has not begun is cancelled.
        """
        while True:
            done, running = wait(futures, _SECONDS_BETWEEN_QUESTIONS, FIRST_EXCEPTION)
            failure = next((error for each in done if (error := each.exception()) is not None), None)
            requested, failed, pending = self._of_all_ranks(failure is not None, bool(running))
            if requested or failed:
                for each in running:
                    each.cancel()
                raise Interrupted from (None if requested else distributed.first_failure(failure))
            if not pending:
                return [each.result() for each in futures]

    def _of_all_ranks(self, *others: float) -> list[float]:
        """Whether one was asked to stop, and the largest of each of ``others``; a collective."""
        values = torch.tensor([self._requested, *others], dtype=torch.float64, device=current_device())
        if dist.is_initialized():
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.tolist()
