"""Built datasets for pages: which there are, and their documents as the terminal's view reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vpmoe.app.shown import SPAN_COLOURS, coloured
from vpmoe.data_curation.look.text import Shown
from vpmoe.data_curation.manifest import FILE_NAME, KINDS, read_manifest
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.runs.registry import RunEntry


def datasets_in(places: Iterable[Path]) -> list[Path]:
    """Folders with a manifest: the places themselves, or what lies in them; each once, in their order."""
    found: dict[Path, None] = {}
    for place in places:
        if os.path.isfile(place / FILE_NAME):  # False also of what cannot be looked at
            found[place] = None
        elif os.path.isdir(place):
            found |= dict.fromkeys(sorted(one.parent for one in place.glob(f"*/{FILE_NAME}")))
    return [*found]


def trained_on(run: RunEntry) -> list[Path]:
    """The datasets of a run, as its configuration names them."""
    data = run.config.get("data", {})
    blend = data.get("blend")
    parts = blend if isinstance(blend, list) else [{"path": data.get("data_path")}]
    named = [part.get("path") for part in parts if isinstance(part, dict)]
    return [Path(path) for path in named if path and isinstance(path, str)]


def figures(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a split: documents, tokens and the spans' shares."""
    rows = []
    for split, entry in manifest["splits"].items():
        tokens = max(entry["tokens"], 1)
        rows.append(
            {
                "split": split,
                "documents": entry["rows"],
                "tokens": entry["tokens"],
                **{f"{name}, %": round(100 * entry["span_tokens"][name] / tokens, 1) for name in SPAN_NAMES},
                "tokens each": round(entry["tokens"] / max(entry["rows"], 1), 1),
                "longest": manifest["length_histogram"][split]["longest"],
            }
        )
    return rows


def document_html(shown: Shown) -> str:
    """A document, each span in its colour."""
    return coloured((run, SPAN_COLOURS[kind], kind) for kind, run in shown.runs)


def judged_html(shown: Shown) -> str:
    """The tokens that a teacher was asked about, the redder the less likely it finds them; under the pointer what it
    finds likelier."""
    pieces = []
    for _, token, p, likeliest in shown.judged:
        told = f"p = {p:.3f}; likeliest: " + ", ".join(f"{other!r} {share:.3f}" for other, share in likeliest)
        pieces.append((token, f"{round(220 * (1 - p) + 40 * p)},{round(60 * (1 - p) + 160 * p)},70", told))
    return coloured(pieces)


def judged_rows(shown: Shown) -> list[dict[str, Any]]:
    """A row a token that a teacher was asked about."""
    return [
        {
            "token": token,
            "span": kind,
            "p": p,
            "the teacher's likeliest": "   ".join(f"{other} {share:.2f}" for other, share in likeliest),
        }
        for kind, token, p, likeliest in shown.judged
    ]


def open_manifest(folder: Path) -> dict[str, Any]:
    """Raises :class:`DataError` where it is no built dataset."""
    return read_manifest(folder, *KINDS)
