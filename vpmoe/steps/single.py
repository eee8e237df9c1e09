"""Reports, pages and pictures: single files that a command writes, and replaces only where it wrote them itself."""

from __future__ import annotations

from pathlib import Path

from vpmoe.errors import NotOursError

MARK = "made by vpmoe"
"""What pictures and pages carry in their metadata; reports carry their ``kind``."""


def check_replaceable(path: Path, mark: str = MARK) -> None:
    """Refuse to replace what lies at ``path`` unless it is a file that bears ``mark``.

    Raises:
        NotOursError: it bears none, or is no file.
    """
    if path.is_symlink() or path.exists():
        try:
            ours = mark.encode() in path.read_bytes()
        except OSError:
            ours = False
        if not ours:
            raise NotOursError(
                f"here lies something that does not say it was {MARK}",
                source=str(path),
                remedy="move it away, or name another file",
            )
