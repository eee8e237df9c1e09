"""Reports, pages and pictures: single files that a command writes, and replaces only where it wrote them itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.errors import visible
from megatron_vpmoe.files import write_atomically
from vpmoe.errors import DataError, NotOursError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

MARK = "made by vpmoe"
"""What pictures and pages carry in their metadata; reports carry their ``kind``."""

# No script, and nothing loaded. Each run keeps its own direction of writing.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="generator" content="{mark}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>{{stylesheet}}
body {{{{ color: {{foreground}}; background: {{background}}; margin: 2rem; }}}} span {{{{ unicode-bidi: isolate; }}}}
pre {{{{ font: 13px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}}}
img {{{{ max-width: 100%; background: white; }}}}
</style></head><body><pre>{{code}}</pre>{picture}</body></html>
"""


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


def plotting() -> Any:
    """Matplotlib's pyplot, which opens no window and names the parts of an SVG alike each time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "vpmoe", "svg.fonttype": "none"})
    from matplotlib import pyplot

    return pyplot


def as_label(text: str) -> str:
    """Text of others in a picture: no formula, and without a leading "_", which would leave it out of a legend."""
    return " " * text.startswith("_") + visible(text).replace("$", r"\$")


def save_picture(figure: Figure, path: Path) -> None:
    """``save_figure`` to where ``--picture`` says; raises :class:`DataError` where that cannot be written."""
    try:
        save_figure(figure, path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {path}: {error}", source="--picture", remedy="name another file") from error


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


def save_page(
    path: Path, show: Callable[[Console], None], *, title: str, width: int, picture: Path | None = None
) -> None:
    """Write what ``show`` prints as an HTML page that needs nothing else, whole or not at all.

    Args:
        path: the page.
        show: prints to the console it is given; what it prints is escaped.
        title: of the page, a plain word of ours.
        width: columns of the console.
        picture: a PNG to stand below.
    """
    from rich.console import Console
    from rich.terminal_theme import SVG_EXPORT_THEME

    console = Console(record=True, width=width, file=io.StringIO())
    show(console)
    shown = "" if picture is None else base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="" src="data:image/png;base64,{shown}">' if shown else ""
    form = _PAGE.format(title=title, mark=MARK, picture=image)
    write_atomically(path, console.export_html(theme=SVG_EXPORT_THEME, code_format=form).encode())
