"""A table for any terminal: where it is too wide, its columns stand in several tables, one below the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_vpmoe.errors import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ANY_WIDTH = 10_000


@dataclass(frozen=True)
class Group:
    """Rows that belong together.

    Attributes:
        heading: above them; None: they have none.
        rows: the cells of each, and whether it is bold.
    """

    heading: str | None
    rows: Sequence[tuple[Sequence[str], bool]]


def show(
    console: Console,
    title: str,
    headings: Sequence[str],
    groups: Iterable[Group],
    *,
    parts: Sequence[Sequence[int]],
    left: Collection[int] = (0,),
) -> None:
    """Print a table whole, or where the console is narrower, a table of each part behind the first column.

    No cell is cut: what is longer in the first column goes on in the next line. A row with nothing in a part is left
    out of it.

    Args:
        console: where to.
        title: above it.
        headings: of the columns.
        groups: the rows; control characters in them are made visible.
        parts: places of columns, of each table.
        left: places of the columns that are no numbers.
    """
    groups = list(groups)
    whole = _table(title, headings, groups, range(1, len(headings)), left)
    if console.measure(whole, options=console.options.update(width=_ANY_WIDTH)).maximum <= console.width:
        console.print(whole)
        return
    for place, part in enumerate(parts):
        table = _table("" if place else title, headings, groups, part, left)
        if table.row_count:
            console.print(table)


def _table(
    title: str, headings: Sequence[str], groups: Sequence[Group], part: Sequence[int], left: Collection[int]
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)) if title else None, title_justify="left")
    for place in (0, *part):
        justify = "left" if place in left else "right"
        table.add_column(headings[place], justify=justify, overflow="fold", no_wrap=place > 0)
    for group in groups:
        rows = [(cells, bold) for cells, bold in group.rows if any(cells[place] for place in part)]
        if rows and group.heading is not None:
            table.add_row(Text(visible(group.heading)))
        for cells, bold in rows:
            table.add_row(*(Text(visible(cells[place])) for place in (0, *part)), style="bold" if bold else "")
        table.add_section()
    return table
