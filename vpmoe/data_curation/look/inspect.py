"""Showing a built dataset, on the terminal or as a page of its own: its figures, and documents coloured by span."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vpmoe.errors import visible
from vpmoe.data_curation.checks.sample import Bar, histogram, sample_split, split_entry
from vpmoe.data_curation.look.text import RUN_KINDS, Shown, documents
from vpmoe.data_curation.manifest import KINDS, read_manifest
from vpmoe.errors import DataError
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.steps import check_replaceable, save_page
from vpmoe.tokenizer.from_dataset import load_tokenizer

SPAN_STYLES = ("dim", "cyan", "green")
STYLES: dict[str, str] = dict(zip(RUN_KINDS, (*SPAN_STYLES, "bold magenta"), strict=True))
ALTERNATIVES = 5
_BAR_WIDTH = 40
_BAR_ROWS = 16
_SPAN_BAR_WIDTH = 14
_SPAN_BAR_ROWS = 8
_PAGE_WIDTH = 120


def inspect(
    dataset_dir: Path,
    console: Console,
    *,
    split: str = "train",
    count: int = 3,
    start: int = 0,
    alternatives: int = ALTERNATIVES,
) -> None:
    """Print the figures of the dataset and ``count`` documents of ``split`` from the ``start``-th on.

    Of a scored dataset also so many ``alternatives`` to each token that its teacher finds likely.

    Raises:
        DataError: no such dataset or split, or no document at ``start``.
    """
    manifest = read_manifest(dataset_dir, *KINDS)
    rows = split_entry(manifest, split)["rows"]
    if count and not 0 <= start < rows:
        raise DataError(
            f"no document {start}: {split} has {rows}", source="--start", remedy="use another split or start"
        )
    console.print(_figures(manifest))
    console.print(_bars(f"tokens a document, {split}", length_bars(manifest, split), _BAR_WIDTH))
    sample = sample_split(dataset_dir, manifest, split, tokens=False)
    console.print(f"tokens a document in each span, {sample.described}")
    spans = [(name, histogram(sample.lengths[name], _SPAN_BAR_ROWS)) for name in SPAN_NAMES]
    console.print(Columns([_bars(name, bars, _SPAN_BAR_WIDTH) for name, bars in spans], padding=(0, 3)))
    console.print(Text("spans: ").append_text(Text("  ").join(Text(kind, STYLES[kind]) for kind in RUN_KINDS)))
    for shown in documents(dataset_dir, manifest, load_tokenizer(dataset_dir), split, start, count, alternatives):
        console.rule(f"{split} {shown.place}: {shown.tokens} tokens, {shown.supervised} supervised")
        console.print(Text().join(Text(run, STYLES[kind]) for kind, run in shown.runs), soft_wrap=True)
        if shown.judged:
            console.print(_judged(shown))


def write_page(dataset_dir: Path, page: Path, **what: Any) -> None:
    """Write what :func:`inspect` prints as one page that needs nothing else; raises as it does.

    Raises:
        NotOursError: something else lies at ``page``.
    """
    check_replaceable(page)
    save_page(page, lambda console: inspect(dataset_dir, console, **what), title="dataset", width=_PAGE_WIDTH)


def _judged(shown: Shown) -> Table:
    """Each token that a teacher was asked about, its probability, and what it finds likely instead."""
    table = Table(
        "token", "p", "the teacher's likeliest", title="a teacher's view, token by token", title_justify="left"
    )
    for kind, token, p, likeliest in shown.judged:
        named = Text("  ").join(Text(f"{text} {each:.2f}", "bold" if text == token else "") for text, each in likeliest)
        table.add_row(Text(token, STYLES[kind]), f"{p:.3f}", named)
    return table


def _figures(manifest: dict[str, Any]) -> Table:
    """Rows, tokens and span shares of each split, truncation and rejects."""
    tokenizer = manifest["tokenizer"]
    title = Text(visible(f"{tokenizer['name']}, {tokenizer['vocab_size']:,} ids"))
    table = Table(title=title, title_justify="left")
    for heading in ("split", "documents", "tokens", *SPAN_NAMES, "tokens each", "longest"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, entry in manifest["splits"].items():
        shares = [f"{entry['span_tokens'][name] / max(entry['tokens'], 1):.1%}" for name in SPAN_NAMES]
        mean = f"{entry['tokens'] / max(entry['rows'], 1):.1f}"
        longest = str(manifest["length_histogram"][split]["longest"])
        table.add_row(split, f"{entry['rows']:,}", f"{entry['tokens']:,}", *shares, mean, longest)
    table.caption = Text("\n".join(facts(manifest)))
    table.caption_justify = "left"
    return table


def facts(manifest: dict[str, Any]) -> list[str]:
    """What was cut and rejected, and what annotated it, a line each."""
    cut = ", ".join(f"{name} {number:,}" for name, number in manifest["truncation"].items() if number)
    told = [f"truncation: {cut or 'none'}; rejects: {manifest['rejects']['count']:,}"]
    for made in manifest.get("annotated", []):
        told.append(f"annotated with {', '.join(made['names'])} by {made['by']['name']}")
        if "positions" in made:
            by, records = made["by"], made["by"]["records"]
            told.append(
                f"  K = {records['count']} at temperature {records['temperature']:g}, reasoning {by['reasoning']}: "
                f"{made['coverage']:.1%} of the documents, {made['positions']:,} positions of "
                f"{made['bytes_a_position']} bytes ({records['coding']}, KL {made['mean_coding_kl']:.1e}); "
                f"captured mass {made['mean_captured_mass']:.4f}, "
                f"lost with ids that the dataset has not {made['mean_lost_mass']:.4f}"
            )
    return [visible(line) for line in told]


def length_bars(manifest: dict[str, Any], split: str) -> list[Bar]:
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


def _bars(title: str, bars: Sequence[Bar], width: int) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    most = max((bar.count for bar in bars), default=0)
    for bar in bars:
        label = f"{bar.low}–{bar.high}" if bar.high > bar.low else str(bar.low)
        table.add_row(label, "█" * round(width * bar.count / most), f"{bar.count:,}")
    return table
