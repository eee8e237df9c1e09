"""Spreading a build's work over processes, or doing it here: results come in order either way."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, parent_process
from typing import Any

from vpmoe.errors import DataError

# Enough work handed out that no worker waits for a slow part before it; few enough that results do not pile up.
_WAITING_PER_WORKER = 3
Crew = Callable[[str, Iterable[Any]], Iterator[Any]]
"""``crew(method, items)``: the worker's method of that name on each item, results in the items' order."""


@contextmanager
def make_crew(worker: type, arguments: tuple[Any, ...], processes: int) -> Iterator[Crew]:
    """A crew of ``processes`` workers ``worker(*arguments)``, ended at the end; a single one works in this process.

    Raises:
        DataError: a process died (killed, or out of memory).
    """
    if processes == 1:
        here = worker(*arguments)
        yield lambda method, items: map(getattr(here, method), items)
        return
    # A fork server starts from a clean process: forking this one, with its threads, could deadlock. It imports what
    # the workers need once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__module__])
    pool = ProcessPoolExecutor(processes, context, _start, (worker, arguments))

    def in_order(method: str, items: Iterable[Any]) -> Iterator[Any]:
        running: deque[Future[Any]] = deque()
        for item in items:
            running.append(pool.submit(_call, method, item))
            if len(running) >= processes * _WAITING_PER_WORKER:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    try:
        yield in_order
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died",
            source=f"{processes} workers",
            remedy="run the same command again, it goes on where it stopped; if memory ran out, with fewer --workers",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Any = None


def _start(worker: type, arguments: tuple[Any, ...]) -> None:
    """Initialise a worker process; it ends itself when the builder is gone, even by kill -9."""
    global _worker
    _worker = worker(*arguments)
    builder = parent_process()
    if builder is not None:
        threading.Thread(target=_end_with, args=(builder.sentinel,), daemon=True).start()


def _call(method: str, item: Any) -> Any:
    return getattr(_worker, method)(item)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
