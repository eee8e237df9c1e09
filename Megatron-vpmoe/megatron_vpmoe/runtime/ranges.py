"""Named ranges of a training step: marks in the code that cost nothing until a profiler listens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

import torch


class RangeListener(Protocol):
    """Told of every range of this process, properly nested."""

    def enter(self, name: str) -> None:
        """A range begins."""
        ...

    def leave(self, name: str) -> None:
        """The innermost range, ``name``, ends; while an exception is raised those within it may not have ended."""
        ...


_listener: RangeListener | None = None
_of_thread = threading.local()


@contextlib.contextmanager
def annotated(name: str) -> Iterator[None]:
    """Mark what runs inside as part of the range ``name``."""
    # First: what is compiled is one range, whoever listens.
    if torch.compiler.is_compiling() or (listener := _listener) is None or getattr(_of_thread, "is_beside", False):
        yield
        return
    listener.enter(name)
    try:
        yield
    finally:  # a recomputation that has what it needs ends by an exception, and the step goes on
        listener.leave(name)


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Tell nobody of this thread's ranges: what runs beside a step nests in none of its ranges."""
    _of_thread.is_beside = True
    try:
        yield
    finally:
        _of_thread.is_beside = False


@contextlib.contextmanager
def listening(listener: RangeListener) -> Iterator[None]:
    """Have ``listener`` told of every range while this runs; one at a time."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
