"""Progress over the tensors of one phase."""

from __future__ import annotations

from vpmoe.progress import Progress


class TensorProgress(Progress):
    """Counts bytes of tensors (None: nobody knows how many); a context manager, called with (name, bytes)."""

    def __init__(self, phase: str, total_bytes: int | None, *, quiet: bool = False) -> None:
        super().__init__(phase, total_bytes, unit="MB", scale=1e6, quiet=quiet)

    def __call__(self, name: str, size: int) -> None:
        """Count one tensor, or one step of another measure, as done."""
        self.add(size, doing=name)
