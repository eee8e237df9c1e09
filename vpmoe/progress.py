"""How far a stage of a job is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn

_LINE_SECONDS = 10.0


class StageProgress:
    """A bar or lines on stderr, silent until the first ``show``; a context manager, whose end prints a last line if the
    stage came to its end.

    Subclasses count, call ``show``, and say in ``line`` what a line reads.

    Args:
        stage: the bar's label.
        total: of the bar; None where nobody knows.
        columns: of the bar.
        quiet: show nothing.
        completed: where the bar begins.
        fields: of the columns, at the start.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        columns: tuple[ProgressColumn, ...],
        *,
        quiet: bool = False,
        completed: int = 0,
        **fields: Any,
    ) -> None:
        self._quiet = quiet
        self._started = self._last_line = time.monotonic()
        self._begun = False
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(stage, total=total, completed=completed, **fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self._begun and not self._quiet:
            self._print("done")

    def show(self, doing: str, completed: int, **fields: Any) -> None:
        """Move the bar to ``completed``; without a bar, print a line if the last one is ten seconds old.

        Args:
            doing: what is being worked on, for ``line``.
            fields: of the bar's columns.
        """
        self._begun = True
        if self._bar:
            self._bar.start()  # nothing where it runs already
            self._bar.update(self._task, completed=completed, **fields)
        elif not self._quiet and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._print(doing)

    def line(self, doing: str, seconds: float) -> str:
        """What a line reads after so many seconds."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """Since the start; above zero."""
        return max(time.monotonic() - self._started, 1e-6)

    def _print(self, doing: str) -> None:
        self._last_line = time.monotonic()
        print(self.line(doing, self.seconds), file=sys.stderr, flush=True)
