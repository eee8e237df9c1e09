"""Reports, pages and pictures: single files that a command writes, and replaces only where it wrote them itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.files import write_atomically
from vpmoe.errors import NotOursError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a picture that bears ``MARK``, whole or not at all, in the format that its suffix names; closes the figure.

    Args:
        options: of matplotlib's ``savefig``.

    Raises:
        ValueError: matplotlib has no such format.
    """
    from matplotlib import pyplot

    # Without date and version the same figure gives the same bytes.
    metadata = {"Date": None, "Creator": MARK} if path.suffix == ".svg" else {"Software": MARK}
    content = io.BytesIO()
    try:
        figure.savefig(content, format=path.suffix[1:] or "png", metadata=metadata, **options)
    finally:
        pyplot.close(figure)
    write_atomically(path, content.getvalue())
