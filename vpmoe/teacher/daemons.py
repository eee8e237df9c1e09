"""Threads that wait for others and never keep a process from ending: what they were at is lost with it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


class Daemons:
    """A pool of them.

    Args:
        count: threads.

    Attributes:
        closed: set by ``close``, for tasks that wait.
    """

    def __init__(self, count: int) -> None:
        self.closed, self._count = Event(), count
        self._tasks: SimpleQueue[tuple[Future, Callable[[], object]] | None] = SimpleQueue()
        for _ in range(count):
            Thread(target=self._work, daemon=True).start()

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """The result of a task that is done once those before it have begun."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Begin no other task; nobody waits for those that are under way."""
        self.closed.set()
        for _ in range(self._count):
            self._tasks.put(None)

    def _work(self) -> None:
        while (taken := self._tasks.get()) is not None:
            future, task = taken
            if self.closed.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                future.set_result(task())
            except BaseException as error:  # whoever asks for the result hears of it
                future.set_exception(error)
