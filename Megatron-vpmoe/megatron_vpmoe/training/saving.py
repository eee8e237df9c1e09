"""A checkpoint on its way to the disk: written by a thread of each rank, made one by rank 0, while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_vpmoe.errors import of_the_system
from megatron_vpmoe.runtime import device, distributed, pulse
from megatron_vpmoe.training.checkpoint_part import Part, Written

_SECONDS_BETWEEN_QUESTIONS = 1.0


class Saving:
    """Writing begins at once. The threads know no collective: the ranks ask each other in ``advance``.

    Until all is written and sealed its folder is a ``.partial``, and the checkpoints before it are as they were.

    Args:
        iteration: of the run.
        path: of the checkpoint.
        part: what this rank writes.
        seal: makes a checkpoint of what all ranks have written, and returns lines for the log; called on rank 0 alone.
        give_up: removes what was written; called on rank 0 alone, when a rank could not write.
        began: ``time.perf_counter()`` when the state was asked for.

    Attributes:
        notes: the lines of ``seal``, on rank 0.
        waited: seconds that nothing else was done in.
        seconds: until the checkpoint stood.
    """

    def __init__(
        self,
        iteration: int,
        path: Path,
        part: Part,
        seal: Callable[[Sequence[Written]], list[str]],
        give_up: Callable[[], None],
        *,
        began: float,
    ) -> None:
        self.iteration, self.path, self._began = iteration, path, began
        self._seal, self._give_up = seal, give_up
        self.notes, self.seconds = list[str](), 0.0
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=device.of_this_thread())
        self._sealing = False
        self._work: Future[Any] = self._thread.submit(part.write)
        self.waited = time.perf_counter() - began

    def advance(self, patience: float = 0.0) -> bool:
        """Whether the checkpoint stands; a collective.

        Args:
            patience: seconds to wait for this rank's thread first.

        Raises:
            VpmoeError: a rank could not write; on every rank that of the first one. What was written is gone.
        """
        wait([self._work], patience)
        pulse.beat()
        failure = self._work.exception() if self._work.done() else None
        running, failed = self._of_any_rank(not self._work.done(), failure is not None)
        if failed:
            self._end()
        if running:
            return False
        if not self._sealing:
            written = cast(list[Written], distributed.gathered(self._work.result()))
            self._sealing = True
            self._work = self._thread.submit(lambda: self._seal(written) if distributed.rank() == 0 else [])
            return self.advance(patience)
        self.notes = self._work.result()
        self.seconds = self.seconds or time.perf_counter() - self._began
        self._thread.shutdown()
        return True

    def wait(self) -> Path:
        """Wait until it stands; a collective, as ``advance``. Within one a rank waits a moment only for a slow disk."""
        began = time.perf_counter()
        while not self.advance(_SECONDS_BETWEEN_QUESTIONS):
            pass
        self.waited += time.perf_counter() - began
        return self.path

    def _end(self) -> None:
        failure = self._work.exception()  # once the thread is done: nobody writes into a folder that goes
        self._thread.shutdown()
        first = distributed.first_failure(of_the_system(failure) if isinstance(failure, OSError) else failure)
        assert first is not None
        if distributed.rank() == 0:
            self._give_up()
        raise first

    @staticmethod
    def _of_any_rank(*questions: bool) -> list[bool]:
        if distributed.world_size() == 1:
            return list(questions)
        answers = torch.tensor(questions, dtype=torch.int32, device=device.current_device())
        dist.all_reduce(answers, op=dist.ReduceOp.MAX)
        return [bool(answer) for answer in answers.tolist()]
