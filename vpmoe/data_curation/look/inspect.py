"""Showing a built dataset on the terminal: its figures, and documents as text with each span in its colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vpmoe.data_curation.checks.kinds import KINDS
from vpmoe.data_curation.checks.stats_sample import Bar, histogram, sample_split, split_entry
from vpmoe.data_curation.look.text import RUN_KINDS, documents, runs
from vpmoe.data_curation.manifest import FILE_NAME, read_manifest
from vpmoe.errors import DataError
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.tokenizer.from_dataset import load_tokenizer
from vpmoe.tokenizer.interface import Tokenizer

SPAN_STYLES = ("dim", "cyan", "green")
_STYLES: dict[str, str] = dict(zip(RUN_KINDS, (*SPAN_STYLES, "bold magenta"), strict=True))
_BAR_WIDTH = 40
_BAR_ROWS = 16
_SPAN_BAR_WIDTH = 14
_SPAN_BAR_ROWS = 8


def inspect(dataset_dir: Path, console: Console, *, split: str = "train", count: int = 3, start: int = 0) -> None:
    """Print the figures of the dataset and ``count`` documents of ``split`` from the ``start``-th on.

    Raises:
        DataError: no such dataset or split, or no document at ``start``.
    """
    manifest = token_manifest(dataset_dir)
    check_place(manifest, split, count, start)
    console.print(figures(manifest))
    console.print(_bars(f"tokens a document, {split}", manifest_bars(manifest, split), _BAR_WIDTH))
    sample = sample_split(dataset_dir, manifest, split, tokens=False)
    console.print(f"tokens a document in each span, {sample.described}")
    spans = [(name, histogram(sample.lengths[name], _SPAN_BAR_ROWS)) for name in SPAN_NAMES]
    console.print(Columns([_bars(name, bars, _SPAN_BAR_WIDTH) for name, bars in spans], padding=(0, 3)))
    tokenizer = load_tokenizer(dataset_dir)
    console.print(Text("spans: ").append_text(Text("  ").join(Text(kind, _STYLES[kind]) for kind in RUN_KINDS)))
    for shown in documents(dataset_dir, manifest, tokenizer, split, start, count):
        console.rule(f"{split} {shown.place}: {shown.tokens} tokens, {shown.supervised} supervised")
        console.print(_styled(shown.runs), soft_wrap=True)


def token_manifest(dataset_dir: Path) -> dict[str, Any]:
    """The manifest of a dataset of token files, of any kind that there is.

    Raises:
        DataError: there is none, or it is of something else.
    """
    manifest = read_manifest(dataset_dir)
    if manifest["kind"] not in KINDS:
        raise DataError(
            f"a dataset of kind {manifest['kind']!r} holds no token files",
            source=str(dataset_dir / FILE_NAME),
            remedy="build it (vpmoe data build) and pass the folder that the build wrote",
        )
    return manifest


def check_place(manifest: dict[str, Any], split: str, count: int, start: int) -> None:
    """Raise :class:`DataError` unless there is such a split, with a document at ``start`` if any is to be shown."""
    rows = split_entry(manifest, split)["rows"]
    if count and not 0 <= start < rows:
        raise DataError(
            f"no document {start}: {split} has {rows}", source="--start", remedy="use another split or start"
        )


def figures(manifest: dict[str, Any]) -> Table:
    """Rows, tokens and span shares of each split, truncation and rejects."""
    table = Table(
        title=f"{manifest['tokenizer']['name']}, {manifest['tokenizer']['vocab_size']:,} ids", title_justify="left"
    )
    headings, rows, caption = figure_rows(manifest)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for row in rows:
        table.add_row(*row)
    table.caption = caption
    table.caption_justify = "left"
    return table


def figure_rows(manifest: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]], str]:
    """Headings and a row of figures for each split, and what was cut and rejected in words."""
    headings = ("split", "documents", "tokens", *SPAN_NAMES, "tokens each", "longest")
    rows = []
    for split, entry in manifest["splits"].items():
        shares = [f"{entry['span_tokens'][name] / max(entry['tokens'], 1):.1%}" for name in SPAN_NAMES]
        mean = f"{entry['tokens'] / max(entry['rows'], 1):.1f}"
        longest = str(manifest["length_histogram"][split]["longest"])
        rows.append([split, f"{entry['rows']:,}", f"{entry['tokens']:,}", *shares, mean, longest])
    cut = ", ".join(f"{name} {number:,}" for name, number in manifest["truncation"].items() if number)
    return headings, rows, f"truncation: {cut or 'none'}; rejects: {manifest['rejects']['count']:,}"


def coloured(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray, label_span: Sequence[int] | np.ndarray) -> Text:
    """A conversation as text, coloured by span; ``label_span[t]`` is the span of token t+1, as it is stored."""
    return _styled(runs(tokenizer, tokens, label_span))


def manifest_bars(manifest: dict[str, Any], split: str) -> list[Bar]:
    """The manifest's histogram of lengths, of every document, in at most 16 bars."""
    counts = np.array(manifest["length_histogram"][split]["counts"])
    filled = np.flatnonzero(counts)
    if not len(filled):
        return []
    low, high = int(filled[0]), int(filled[-1]) + 1
    together = -(-(high - low) // _BAR_ROWS)
    width = manifest["length_histogram"]["bin_width"]
    return [
        Bar(at * width, (at + together) * width - 1, int(counts[at : at + together].sum()))
        for at in range(low, high, together)
    ]


def _styled(shown: Sequence[tuple[str, str]]) -> Text:
    text = Text()
    for kind, run in shown:
        text.append(run, style=_STYLES[kind])
    return text


def _bars(title: str, bars: Sequence[Bar], width: int) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    most = max((bar.count for bar in bars), default=0)
    for bar in bars:
        label = f"{bar.low}–{bar.high}" if bar.high > bar.low else str(bar.low)
        table.add_row(label, "█" * round(width * bar.count / most), f"{bar.count:,}")
    return table
