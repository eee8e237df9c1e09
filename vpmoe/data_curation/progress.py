"""Progress of a long job over rows: rows/s, tokens/s and time left."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vpmoe.progress import StageProgress


class RowProgress(StageProgress):
    """Counts rows and tokens of one phase of a job; use as a context manager.

    Args:
        phase: what is being done, the bar's label.
        total_rows: rows that the phase will see; None where nobody knows.
        quiet: show nothing.
        done_before: rows of an earlier run; they count as done, not towards the rates.
        share: how much is done, 0..1, where the rows have not been counted.
    """

    def __init__(
        self,
        phase: str,
        total_rows: int | None,
        *,
        quiet: bool = False,
        done_before: int = 0,
        share: Callable[[], float] | None = None,
    ) -> None:
        self.phase, self.total_rows, self._share = phase, total_rows, share
        self.rows, self.tokens, self._before = done_before, 0, done_before
        label, counts = TextColumn("{task.description}"), TextColumn("{task.fields[count]} rows  {task.fields[rates]}")
        columns = (label, BarColumn(), counts, TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(phase, total_rows, columns, quiet=quiet, completed=done_before, count="", rates="")

    def add(self, rows: int, tokens: int) -> None:
        """Count ``rows`` and ``tokens`` more as done."""
        self.rows += rows
        self.tokens += tokens
        self.show("", self.rows, count=self._count(), rates=self._rates(self.seconds))

    def line(self, doing: str, seconds: float) -> str:
        made, left = self.rows - self._before, ""
        done = self._share() if self._share else 0.0
        if self.total_rows is not None and made:
            left = f"  about {seconds / made * (self.total_rows - self.rows):.0f} s left"
        elif 0 < done <= 1:
            left = f"  {done:.0%}, about {seconds * (1 - done) / done:.0f} s left"
        return f"{self.phase}: {self._count()} rows  {self._rates(seconds)}{left}"

    def _rates(self, seconds: float) -> str:
        tokens = f"  {self.tokens / seconds / 1e6:.2f} M tokens/s" if self.tokens else ""
        return f"{(self.rows - self._before) / seconds:,.0f} rows/s{tokens}"

    def _count(self) -> str:
        return f"{self.rows:,}" if self.total_rows is None else f"{self.rows:,}/{self.total_rows:,}"
