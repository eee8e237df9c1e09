"""Text of others on a page: shown as it is written, never read as HTML, Markdown, LaTeX or directives of Streamlit.

Streamlit reads Markdown in most of what it is given, so what comes from data, models, runs or reports takes one of the
ways here: escaped HTML of our own, code without a language, or a table's cell. Characters that are not seen, turn the
direction or have no UTF-8 are spelled as code points.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

import pandas
import streamlit

from megatron_vpmoe.errors import VpmoeError, visible

SPAN_COLOURS = {"context": "128,128,128", "analysis": "0,150,200", "final": "40,160,70", "special": "190,60,190"}
"""Red, green and blue; as translucent backgrounds they are read on light and on dark."""
_LONGEST_LABEL = 60


def label(text: str) -> str:
    """One short line, for a list, a legend or a heading of a table."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 1] + "…"


def path_label(path: str) -> str:
    """A path as one short line: where it is cut it keeps its end, by which paths of one folder differ."""
    line = visible(" ".join(path.split()))
    return line if len(line) <= _LONGEST_LABEL else "…" + line[1 - _LONGEST_LABEL :]


def distinct(names: Sequence[str], ids: Sequence[str]) -> list[str]:
    """Labels of things, with the beginning of their ids where names are the same."""
    labels = [label(name) for name in names]
    return [
        one if labels.count(one) == 1 else f"{one} ({visible(key[:6])})" for one, key in zip(labels, ids, strict=True)
    ]


def coloured(pieces: Iterable[tuple[str, str, str]]) -> str:
    """HTML of runs of text: (text, "red,green,blue" or empty, what is told of it under the pointer)."""
    spans = []
    for text, colour, told in pieces:
        style = f"background:rgba({colour},.28);border-radius:3px;" if colour else ""
        title = f' title="{html.escape(visible(told))}"' if told else ""
        spans.append(f'<span style="unicode-bidi:isolate;{style}"{title}>{html.escape(visible(text))}</span>')
    return f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6">{"".join(spans)}</div>'


def text(words: str, *, colour: str = "", aside: bool = False) -> None:
    """Show a text as it is; ``aside``: small and pale."""
    page = coloured([(words, colour, "")])
    streamlit.html(f'<div style="font-size:.85em;opacity:.65">{page}</div>' if aside else page)


def legend(colours: dict[str, str]) -> None:
    """What the colours mean."""
    streamlit.html(
        coloured([piece for name, colour in colours.items() for piece in ((name, colour, ""), ("  ", "", ""))])
    )


def table(rows: Sequence[dict[str, Any]] | pandas.DataFrame, **how: Any) -> None:
    """Rows as a table; strings in it are made harmless."""
    frame = rows if isinstance(rows, pandas.DataFrame) else pandas.DataFrame(rows)
    frame = frame.rename(columns=lambda name: label(str(name)))
    streamlit.dataframe(
        frame.map(lambda cell: visible(cell) if isinstance(cell, str) else cell), hide_index=True, **how
    )


def refusal(error: VpmoeError) -> None:
    """What cannot be shown, and what to do."""
    streamlit.error("This cannot be shown.", icon=":material/error:")
    streamlit.code(str(error), language=None, wrap_lines=True)


def empty(what: str, *commands: str) -> None:
    """There is nothing yet, and how it is made."""
    streamlit.info(what, icon=":material/info:")
    for command in commands:
        streamlit.code(command, language=None, wrap_lines=True)
