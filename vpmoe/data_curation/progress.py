"""Progress of a long job: a bar on a terminal, a line now and then elsewhere; rows/s, tokens/s and time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


class RowProgress:
    """Counts rows and tokens of one phase of a job; use as a context manager.

    Args:
        phase: what is being done, the bar's label.
        total_rows: rows that the phase will see.
        quiet: show nothing.
    """

    def __init__(self, phase: str, total_rows: int, *, quiet: bool = False) -> None:
        self.phase, self.total_rows = phase, total_rows
        self.rows = self.tokens = 0
        self._quiet = quiet
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} rows  {task.fields[rates]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(phase, total=total_rows, rates="")

    def __enter__(self) -> RowProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and not self._quiet:
            self._print_line()

    def add(self, rows: int, tokens: int) -> None:
        """Count ``rows`` and ``tokens`` more as done."""
        self.rows += rows
        self.tokens += tokens
        if self._bar:
            self._bar.update(self._task, completed=self.rows, rates=self._rates())
        elif not self._quiet and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._print_line()

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-6)
        tokens = f"  {self.tokens / seconds / 1e6:.2f} M tokens/s" if self.tokens else ""
        return f"{self.rows / seconds:,.0f} rows/s{tokens}"

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._started
        left = seconds / self.rows * (self.total_rows - self.rows) if self.rows else float("nan")
        print(
            f"{self.phase}: {self.rows:,}/{self.total_rows:,} rows  {self._rates()}  about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
