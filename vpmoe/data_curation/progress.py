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
        total_rows: rows that the phase will see; None where nobody knows.
        quiet: show nothing.
        done_before: rows of an earlier run; they count as done, not towards the rates.
    """

    def __init__(self, phase: str, total_rows: int | None, *, quiet: bool = False, done_before: int = 0) -> None:
        self.phase, self.total_rows = phase, total_rows
        self.rows, self.tokens, self._before = done_before, 0, done_before
        self._quiet = quiet
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]} rows  {task.fields[rates]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar, self._task = (
                bar,
                bar.add_task(phase, total=total_rows, completed=done_before, count="", rates=""),
            )

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
            self._bar.update(self._task, completed=self.rows, count=self._count(), rates=self._rates())
        elif not self._quiet and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._print_line()

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-6)
        tokens = f"  {self.tokens / seconds / 1e6:.2f} M tokens/s" if self.tokens else ""
        return f"{(self.rows - self._before) / seconds:,.0f} rows/s{tokens}"

    def _count(self) -> str:
        return f"{self.rows:,}" if self.total_rows is None else f"{self.rows:,}/{self.total_rows:,}"

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._started
        made, left = self.rows - self._before, ""
        if self.total_rows is not None and made:
            left = f"  about {seconds / made * (self.total_rows - self.rows):.0f} s left"
        print(f"{self.phase}: {self._count()} rows  {self._rates()}{left}", file=sys.stderr, flush=True)
