"""Progress over the tensors of one stage."""

from __future__ import annotations

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vpmoe.progress import StageProgress


class TensorProgress(StageProgress):
    """Counts bytes of tensors; use as a context manager and call it with (name, bytes).

    Args:
        stage: what is being done.
        total_bytes: how many there will be; None where nobody knows.
        quiet: show nothing.
    """

    def __init__(self, stage: str, total_bytes: int | None, *, quiet: bool = False) -> None:
        self.stage, self.total, self.done = stage, total_bytes, 0
        label, name = TextColumn("{task.description}"), TextColumn("{task.fields[name]}")
        times = TimeElapsedColumn(), TimeRemainingColumn()
        super().__init__(stage, total_bytes, (label, BarColumn(), DownloadColumn(), *times, name), quiet=quiet, name="")

    def __call__(self, name: str, size: int) -> None:
        """Count one tensor, or one step of another measure, as done."""
        self.done += size
        self.show(name, self.done, name=name)

    def line(self, doing: str, seconds: float) -> str:
        share = f" of {self.total / 1e6:.1f}" if self.total else ""
        return f"  {self.stage}: {self.done / 1e6:.1f}{share} MB in {seconds:.0f} s, {doing}"
