"""Progress over the tensors of one phase."""

from __future__ import annotations

from vpmoe.progress import Progress


class TensorProgress(Progress):
    """Counts bytes of tensors; use as a context manager and call it with (name, bytes).

    Args:
        phase: what is being done.
        total_bytes: how many there will be; None where nobody knows.
        quiet: show nothing.
    """

    def __init__(self, phase: str, total_bytes: int | None, *, quiet: bool = False) -> None:
        super().__init__(phase, total_bytes, unit="MB", scale=1e6, quiet=quiet)

    def __call__(self, name: str, size: int) -> None:
        """Count one tensor, or one step of another measure, as done."""
        self.add(size, doing=name)
