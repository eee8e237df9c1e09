"""What a run is asked from outside. To stop, by SIGTERM, SIGINT or a notice: the loop leaves what it is at, writes a
checkpoint and exits 0. To save, by SIGUSR1: after the step it writes a checkpoint and goes on.
"""

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

from megatron_vpmoe.runtime import distributed, pulse
from megatron_vpmoe.runtime.device import current_device
from megatron_vpmoe.runtime.notices import Notice

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
    """Remembers what was asked for, until all ranks have agreed on it; whoever asks for it shows that it lives.

    A second SIGINT ends the process at once, for the impatient.

    Args:
        notices: that ask for a stop as well; the same on every rank.

    Attributes:
        why: what asked for the stop that was agreed on, on every rank.
    """

    def __init__(self, *notices: Notice) -> None:
        self._requested = self._saves = 0
        self._notices, self._looked = notices, 0.0
        self.why = "asked to stop"

    def install(self) -> StopRequest:
        """Take over SIGTERM, SIGINT and SIGUSR1 of this process (main thread only)."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(signum, self._handle)
        return self

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGUSR1:
            self._saves += 1
            return
        if 0 < self._requested < signal.NSIG and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._requested = self._requested or signum

    def is_requested(self) -> bool:
        """Whether this rank was asked to stop."""
        pulse.beat()
        now = time.monotonic()
        if not self._requested and now - self._looked > _SECONDS_BETWEEN_QUESTIONS:
            self._looked = now
            standing = [number for number, notice in enumerate(self._notices, signal.NSIG) if notice.stands()]
            self._requested = max(standing, default=0)
        return self._requested > 0

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective, so that all ranks stop after the same step."""
        return self._of_all_ranks()[0] > 0

    def agreed_to_save(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether one was asked to save and go on; a collective."""
        asked = self._saves
        stop, save = self._of_all_ranks(asked)
        self._saves -= asked
        return stop > 0, save > 0

    def check(self) -> Callable[[], None]:
        """A function to call before each of many like pieces of work, as often on each rank; a collective.

        It raises ``Interrupted`` on all ranks before the same piece, about a second after a rank was asked to stop:
        the ranks ask each other every so many calls, which all of them know from the slowest one's time.
        """
        every = left = 1
        since = time.monotonic()

        def ask() -> None:
            nonlocal every, left, since
            pulse.beat()
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
        """What one was asked to stop by, and the largest of each of ``others``; a collective."""
        self.is_requested()
        values = torch.tensor([self._requested, *others], dtype=torch.float64, device=current_device())
        if dist.is_initialized():
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        requested, *largest = values.tolist()
        if requested >= signal.NSIG:
            self.why = self._notices[int(requested) - signal.NSIG].text
        pulse.beat()
        return [requested, *largest]
