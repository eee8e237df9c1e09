"""How far a phase of a long work is: a bar on a terminal, a line now and then elsewhere; both on stderr, by rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LINE_SECONDS = 10.0
_BAR_SECONDS = 0.1
_LONG_TO_HASH = 1 << 30


class Progress:
    """Counts what is done of one phase; a context manager, silent until something is counted.

    Args:
        phase: what is being done, the label.
        total: of what is counted; None where nobody knows.
        unit: what is counted, such as rows.
        scale: how many make one unit, such as 1e6 for MB of bytes.
        done_before: of an earlier run; it counts as done, not towards the rates.
        share: how much of the whole is done, 0 to 1, where the total is not known but this is.
        quiet: show nothing.
    """

    def __init__(
        self,
        phase: str,
        total: float | None,
        *,
        unit: str = "rows",
        scale: float = 1.0,
        done_before: int = 0,
        share: Callable[[], float] | None = None,
        quiet: bool = False,
    ) -> None:
        self.phase, self._total, self._unit, self._scale, self._share = phase, total, unit, scale, share
        self.done, self.tokens, self._done_before = done_before, 0, done_before
        console = Console(stderr=True)
        self._as_bar, self._quiet, self._shown = console.is_terminal, quiet, False
        text = TextColumn("{task.fields[text]}")
        columns = (TextColumn("{task.description}"), BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=console, disable=quiet or not self._as_bar)
        whole, completed = (total, done_before) if share is None else (1.0, 0)
        self._bar.add_task(phase, total=whole, completed=completed, text="")
        self._next = time.monotonic() + (0.0 if self._as_bar else _LINE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown and kind is None:
            self._show("done")
        self._bar.stop()

    def add(self, amount: float, tokens: int = 0, *, doing: str = "") -> None:
        """Count ``amount`` more as done.

        Args:
            amount: of what is counted.
            tokens: that it holds, for their rate.
            doing: what is being worked on.
        """
        self.done += amount
        self.tokens += tokens
        self._shown = True
        if not self._quiet and time.monotonic() >= self._next:
            self._show(doing)

    def _show(self, doing: str) -> None:
        self._next = time.monotonic() + (_BAR_SECONDS if self._as_bar else _LINE_SECONDS)
        task = self._bar.tasks[0]
        text = self._text(max(task.elapsed or 0.0, 1e-6), doing)
        self._bar.update(task.id, completed=self.done if self._share is None else self._share(), text=text)
        if self._quiet:
            return
        if self._as_bar:
            self._bar.start()
            return
        left = f"  {task.percentage:.0f}%, about {task.time_remaining:.0f} s left" if task.time_remaining else ""
        self._bar.console.print(f"{self.phase}: {text}{left}", soft_wrap=True, highlight=False, markup=False)

    def _text(self, seconds: float, doing: str) -> str:
        digits = 0 if self._scale == 1 else 1
        whole = f"/{self._total / self._scale:,.{digits}f}" if self._total else ""
        rate = (self.done - self._done_before) / self._scale / seconds
        counted = f"{self.done / self._scale:,.{digits}f}{whole} {self._unit}  {rate:,.{digits}f} {self._unit}/s"
        per_second = self.tokens / seconds
        short = f"{per_second / 1e6:.2f} M" if per_second >= 1e5 else f"{per_second:,.0f}"  # data side; models
        tokens = f"  {short} tokens/s" if self.tokens else ""
        return f"{counted}{tokens}{'  ' * bool(doing)}{doing}"


@contextmanager
def hashing(phase: str, total: int) -> Iterator[Callable[[int], None]]:
    """What is told the bytes of each piece that is hashed, of ``total``; shown where that takes long."""
    with Progress(phase, total, unit="MB", scale=1e6, quiet=total < _LONG_TO_HASH) as progress:
        yield progress.add
