"""Showing a built dataset: its figures, and conversations as text with each span in its colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vpmoe.data_curation.build_plan import KIND
from vpmoe.data_curation.manifest import read_manifest
from vpmoe.data_curation.token_files import Triple, read_triple
from vpmoe.errors import DataError
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.tokenizer.from_dataset import load_tokenizer
from vpmoe.tokenizer.interface import Tokenizer

SPAN_STYLES = ("dim", "cyan", "green")
_SPECIAL_STYLE = "bold magenta"
_BAR_WIDTH = 40
_BAR_ROWS = 16


def inspect(dataset_dir: Path, console: Console, *, split: str = "train", count: int = 3, start: int = 0) -> None:
    """Print the figures of the dataset and ``count`` conversations of ``split`` from the ``start``-th on.

    Raises:
        DataError: no such dataset or split, or no conversation at ``start``.
    """
    manifest = read_manifest(dataset_dir, KIND)
    if split not in manifest["splits"]:
        raise DataError(f"no split {split!r}", source="--split", remedy=f"use one of {', '.join(manifest['splits'])}")
    rows = manifest["splits"][split]["rows"]
    if count and not 0 <= start < rows:
        raise DataError(
            f"no conversation {start}: {split} has {rows}", source="--start", remedy="use another split or start"
        )
    console.print(figures(manifest))
    console.print(_histogram(manifest, split))
    tokenizer = load_tokenizer(dataset_dir)
    legend = Text("spans: ").append("context", SPAN_STYLES[0]).append("  analysis", SPAN_STYLES[1])
    console.print(legend.append("  final", SPAN_STYLES[2]).append("  special token", _SPECIAL_STYLE))
    for place, triple, document in _documents(dataset_dir, manifest, split, start, count):
        begin, end = triple.bounds[document], triple.bounds[document + 1]
        console.rule(f"{split} {place}: {end - begin} tokens, {int(triple.lossmask[begin:end].sum())} supervised")
        console.print(coloured(tokenizer, triple.tokens[begin:end], triple.span[begin:end]), soft_wrap=True)


def figures(manifest: dict[str, Any]) -> Table:
    """Rows, tokens and span shares of each split, truncation and rejects."""
    table = Table(
        title=f"{manifest['tokenizer']['name']}, {manifest['tokenizer']['vocab_size']:,} ids", title_justify="left"
    )
    for heading in ("split", "conversations", "tokens", *SPAN_NAMES, "tokens each", "longest"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, entry in manifest["splits"].items():
        shares = [f"{entry['span_tokens'][name] / max(entry['tokens'], 1):.1%}" for name in SPAN_NAMES]
        mean = f"{entry['tokens'] / max(entry['rows'], 1):.1f}"
        longest = str(manifest["length_histogram"][split]["longest"])
        table.add_row(split, f"{entry['rows']:,}", f"{entry['tokens']:,}", *shares, mean, longest)
    cut = ", ".join(f"{name} {number:,}" for name, number in manifest["truncation"].items() if number)
    table.caption = f"truncation: {cut}; rejects: {manifest['rejects']['count']:,}"
    table.caption_justify = "left"
    return table


def coloured(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray, label_span: Sequence[int] | np.ndarray) -> Text:
    """A conversation as text, coloured by span; ``label_span[t]`` is the span of token t+1, as it is stored."""
    spans = [0, *(int(span) for span in label_span[:-1])]
    keyed = [
        (_SPECIAL_STYLE if tokenizer.is_special(int(token)) else SPAN_STYLES[span], int(token))
        for token, span in zip(tokens, spans, strict=True)
    ]
    text = Text()
    # Runs of one colour are decoded as a whole: a character may be spelled by several tokens.
    for style, run in groupby(keyed, key=lambda item: item[0]):
        text.append(tokenizer.decode([token for _, token in run]), style=style)
    return text


def _documents(
    folder: Path, manifest: dict[str, Any], split: str, start: int, count: int
) -> Iterator[tuple[int, Triple, int]]:
    first = 0
    for shard in manifest["splits"][split]["shards"]:
        wanted = range(max(start, first), min(start + count, first + shard["rows"]))
        if wanted:
            triple = read_triple(folder / split, shard["name"])
            yield from ((place, triple, place - first) for place in wanted)
        first += shard["rows"]


def _histogram(manifest: dict[str, Any], split: str) -> Table:
    counts = np.array(manifest["length_histogram"][split]["counts"])
    filled = np.flatnonzero(counts)
    table = Table(title=f"tokens a conversation, {split}", title_justify="left", box=None, show_header=False)
    if not len(filled):
        return table
    low, high = int(filled[0]), int(filled[-1]) + 1
    together = -(-(high - low) // _BAR_ROWS)
    width = manifest["length_histogram"]["bin_width"]
    sums = [(at, int(counts[at : at + together].sum())) for at in range(low, high, together)]
    most = max(number for _, number in sums)
    for at, number in sums:
        label = f"{at * width}–{(at + together) * width - 1}"
        table.add_row(label, "█" * round(_BAR_WIDTH * number / most), f"{number:,}")
    return table
