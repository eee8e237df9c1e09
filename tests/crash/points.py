"""Instants of a run, found from outside: a function's n-th call, or the n-th time that the system is asked of a path.

The product knows nothing of this. A process that has reached its point tells of it and stops (SIGSTOP), so that whoever
started it kills whom it likes at that instant.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training_runs import worker

_AUDITED = {"open": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0}
"""Python's audit events, each raised before the call, and which of its arguments is the path that matters."""


@dataclass(frozen=True)
class Point:
    """An instant.

    Args:
        what: ``module:name`` or ``module:Class.method``; or what the system is asked: ``open``, ``rename``, ``remove``,
            ``rmdir``, ``mkdir``, ``fsync``, with ``|`` between several.
        path: of system calls, what is found in the path (a regular expression); of a rename in the new one.
        count: which time.
        holds: the thread that has made this call goes no further.
    """

    what: str
    path: str = ""
    count: int = 1
    holds: bool = False


class _Chain:
    """Points in order: each is looked for once the one before was reached; then ``reached`` is called."""

    def __init__(self, points: Sequence[Point], reached: Callable[[], None]) -> None:
        self._points, self._reached = list(points), reached
        self._left, self._is_telling = points[0].count, False
        sys.addaudithook(self._audited)
        os.fsync = self._with_call(os.fsync)
        for place in {point.what for point in points if ":" in point.what}:
            module, _, name = place.partition(":")
            owner: Any = importlib.import_module(module)
            *classes, last = name.split(".")
            for each in classes:
                owner = getattr(owner, each)
            setattr(owner, last, self._with_call(getattr(owner, last), place))

    def _with_call(self, function: Callable[..., Any], place: str = "fsync") -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{arguments[0]}") if place == "fsync" else ""
            holds = self._met(place, path)
            result = function(*arguments, **named)
            while holds:
                time.sleep(1)
            return result

        return counted

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDITED and not self._is_telling:
            path = arguments[_AUDITED[event]]
            self._met(
                event.removeprefix("os."), os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
            )

    def _met(self, what: str, path: str) -> bool:
        """Count it; whether the thread is to be held."""
        point = self._points[0] if self._points else None
        if point is None or what not in point.what.split("|") or not re.search(point.path, path):
            return False
        self._left -= 1
        if self._left:
            return False
        self._points.pop(0)
        if self._points:
            self._left = self._points[0].count
            return point.holds
        self._is_telling = True
        self._reached()
        return False


def stopping_at(arguments: list[str], points: Sequence[Point], here: str) -> int:
    """What one process of a run does that stops where ``points`` lead, once it has written the file ``here``."""

    def reached() -> None:
        Path(here).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    if points:
        _Chain(points, reached)
    return worker(arguments)
