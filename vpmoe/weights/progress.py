"""Progress over the tensors of one stage: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


class TensorProgress:
    """Counts bytes of tensors; use as a context manager and call it with (name, bytes). Silent until the first call.

    Args:
        stage: what is being done.
        total_bytes: how many there will be; None where nobody knows.
        quiet: show nothing.
    """

    def __init__(self, stage: str, total_bytes: int | None, *, quiet: bool = False) -> None:
        self.stage, self.total, self.done = stage, total_bytes, 0
        self._quiet = quiet
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            label, name = TextColumn("{task.description}"), TextColumn("{task.fields[name]}")
            times = TimeElapsedColumn(), TimeRemainingColumn()
            self._bar = Progress(label, BarColumn(), DownloadColumn(), *times, name, console=Console(stderr=True))
            self._task = self._bar.add_task(stage, total=total_bytes, name="")

    def __enter__(self) -> TensorProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self.done and not self._quiet:
            self._line("done")

    def __call__(self, name: str, size: int) -> None:
        """Count one tensor, or one step of another measure, as done."""
        self.done += size
        if self._bar:
            self._bar.start()  # nothing where it runs already
            self._bar.update(self._task, advance=size, name=name)
        elif not self._quiet and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._line(name)

    def _line(self, name: str) -> None:
        share = f" of {self.total / 1e6:.1f}" if self.total else ""
        state = f"{self.done / 1e6:.1f}{share} MB in {time.monotonic() - self._started:.0f} s, {name}"
        print(f"  {self.stage}: {state}", file=sys.stderr, flush=True)
