"""Spreading a build's work over processes, or doing it here: one interface, results as they come."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from vpmoe.data_curation.datasets.kd_parts import PartBuilder, WorkPlan, run_call, start_worker
from vpmoe.errors import DataError

# Enough work handed out that no worker waits; few enough that results do not pile up.
_WAITING_PER_WORKER = 3


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a method of :class:`PartBuilder`."""

    method: str
    arguments: tuple[Any, ...]


class Crew(Protocol):
    """Runs calls of :class:`PartBuilder`'s methods."""

    def work_off(self, calls: deque[Call]) -> Iterator[tuple[Call, Any]]:
        """``(call, result)`` as each is done, in any order; calls put into the deque meanwhile are worked off too."""
        ...


class _Here:
    """Everything in this process."""

    def __init__(self, plan: WorkPlan) -> None:
        self._builder = PartBuilder(plan)

    def work_off(self, calls: deque[Call]) -> Iterator[tuple[Call, Any]]:
        while calls:
            call = calls.popleft()
            yield call, getattr(self._builder, call.method)(*call.arguments)


class _Pool:
    """A pool of processes, each with its own vocabulary."""

    def __init__(self, pool: ProcessPoolExecutor, workers: int) -> None:
        self._pool, self._at_once = pool, workers * _WAITING_PER_WORKER

    def work_off(self, calls: deque[Call]) -> Iterator[tuple[Call, Any]]:
        running: dict[Future[Any], Call] = {}
        while calls or running:
            while calls and len(running) < self._at_once:
                call = calls.popleft()
                running[self._pool.submit(run_call, call.method, *call.arguments)] = call
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


@contextmanager
def make_crew(plan: WorkPlan, workers: int) -> Iterator[Crew]:
    """A crew of ``workers`` processes, stopped at the end; with 1, the work is done in this process.

    Raises:
        DataError: a worker process died (killed, or out of memory).
    """
    if workers == 1:
        yield _Here(plan)
        return
    # A fork server starts from a clean process: forking this one, with its threads, could deadlock. It imports what
    # the workers need once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vpmoe.data_curation.datasets.kd_parts"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(plan,))
    try:
        yield _Pool(pool, workers)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died",
            source=f"{workers} workers",
            remedy="run the same command again, it goes on where it stopped; if memory ran out, with fewer --workers",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
