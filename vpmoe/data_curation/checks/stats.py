"""Two datasets compared: size, spans, lengths, vocabulary, and the tokens that tell them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vpmoe.errors import visible
from vpmoe.data_curation.checks.sample import DEFAULT_DOCUMENTS, Sample, quantile, sample_split, split_entry
from vpmoe.data_curation.manifest import KINDS, read_manifest
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.tokenizer.from_dataset import load_tokenizer

QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def compare(
    first: Path, second: Path, *, split: str = "train", limit: int = DEFAULT_DOCUMENTS, top: int = 20
) -> dict[str, Any]:
    """Compare one split of two datasets; their vocabularies may differ, since tokens are matched by their bytes.

    Rows, tokens and spans are the manifests'; lengths and tokens are of up to ``limit`` documents each (0: all).

    Returns:
        ``{"split", "datasets": [{"name", "kind", "tokenizer", "rows", "tokens", "tokens_each", "span_shares",
        "documents_read", "lengths": {span: {quantile: tokens}}}, ...], "vocabulary": {"both", "only_first",
        "only_second", "overlap", "covered_first", "covered_second"}, "differing_tokens": [{"token", "first",
        "second", "g2"}, ...]}``. ``overlap`` is the Jaccard index of the tokens that occur; ``covered_first`` the share
        of the first one's tokens that also occur in the second; shares are in 0..1.

    Raises:
        DataError: no such dataset or split, or a damaged one.
    """
    counts, datasets = [], []
    for folder in (first, second):
        manifest = read_manifest(folder, *KINDS)
        sample = sample_split(folder, manifest, split, limit)
        datasets.append(_summary(folder, manifest, split, sample))
        counts.append(_counts_by_piece(folder, sample))
    pieces = sorted(counts[0].keys() | counts[1].keys())
    a, b = (np.array([own.get(piece, 0) for piece in pieces], dtype=np.int64) for own in counts)
    return {
        "split": split,
        "datasets": datasets,
        "vocabulary": _vocabulary(a, b),
        "differing_tokens": _differing(pieces, a, b, top),
    }


def log_likelihood(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """Dunning's G² of each token: how surprising its counts are if both datasets used it equally often.

    "Accurate Methods for the Statistics of Surprise and Coincidence" (1993), in its usual form for corpus comparison:
    2 · Σ observed · ln(observed / expected) over the two datasets.

    Args:
        a, b: int64 ``[tokens]``, counts in each dataset.
    """
    total = a.sum() + b.sum()
    result = np.zeros(len(a))
    for counts in (a, b):
        expected = (a + b) * (counts.sum() / max(total, 1))
        filled = counts > 0
        result[filled] += 2 * counts[filled] * np.log(counts[filled] / expected[filled])
    return result


def show(compared: dict[str, Any], console: Console) -> None:
    """Print what :func:`compare` found as tables."""
    datasets = compared["datasets"]
    rows = [
        [key.replace("_", " "), *(dataset[key] for dataset in datasets)]
        for key in ("kind", "tokenizer", "rows", "tokens", "tokens_each", "documents_read")
    ]
    rows += [
        [f"share of {name}", *(f"{dataset['span_shares'][name]:.1%}" for dataset in datasets)] for name in SPAN_NAMES
    ]
    names = [dataset["name"] for dataset in datasets]
    console.print(_table(f"split {compared['split']}", ["", *names], rows))
    lengths = [
        [name, dataset["name"], *dataset["lengths"][name].values()]
        for name in ("all", *SPAN_NAMES)
        for dataset in datasets
    ]
    console.print(_table("tokens a document", ["span", "dataset", *QUANTILES], lengths, left=2))
    vocabulary = compared["vocabulary"]
    console.print(
        f"tokens that occur: {vocabulary['both']:,} in both, {vocabulary['only_first']:,} in the first only, "
        f"{vocabulary['only_second']:,} in the second only; overlap {vocabulary['overlap']:.1%}.\n"
        f"{vocabulary['covered_first']:.2%} of the first's text is of tokens that the second has, "
        f"{vocabulary['covered_second']:.2%} the other way round."
    )
    tokens = [
        [repr(entry["token"]), f"{entry['first']:.3%}", f"{entry['second']:.3%}", f"{entry['g2']:,.0f}"]
        for entry in compared["differing_tokens"]
    ]
    console.print(_table("tokens that differ most", ["token", "first", "second", "G²"], tokens))


def _table(title: str, headings: list[str], rows: list[list[Any]], *, left: int = 1) -> Table:
    """A table whose first ``left`` columns are words; texts are shown as they are."""
    table = Table(title=title, title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(Text(heading), justify="left" if place < left else "right")
    for row in rows:
        table.add_row(*(Text(_spelled(cell)) for cell in row))
    return table


def _summary(folder: Path, manifest: dict[str, Any], split: str, sample: Sample) -> dict[str, Any]:
    entry = split_entry(manifest, split)
    return {
        "name": visible(folder.resolve().name),
        "kind": manifest["kind"],
        "tokenizer": f"{manifest['tokenizer']['name']}, {manifest['tokenizer']['vocab_size']:,} ids",
        "rows": entry["rows"],
        "tokens": entry["tokens"],
        "tokens_each": round(entry["tokens"] / max(entry["rows"], 1), 2),
        "span_shares": {name: entry["span_tokens"][name] / max(entry["tokens"], 1) for name in SPAN_NAMES},
        "documents_read": sample.read,
        "lengths": {
            name: {
                called: None if (value := quantile(lengths, share)) is None else round(value, 1)
                for called, share in QUANTILES.items()
            }
            for name, lengths in sample.lengths.items()
        },
    }


def _counts_by_piece(folder: Path, sample: Sample) -> dict[bytes, int]:
    pieces = load_tokenizer(folder).pieces()
    return {pieces[token_id]: int(sample.token_counts[token_id]) for token_id in np.flatnonzero(sample.token_counts)}


def _vocabulary(a: NDArray[np.int64], b: NDArray[np.int64]) -> dict[str, Any]:
    in_a, in_b = a > 0, b > 0
    both = int((in_a & in_b).sum())
    return {
        "both": both,
        "only_first": int((in_a & ~in_b).sum()),
        "only_second": int((in_b & ~in_a).sum()),
        "overlap": both / max(len(a), 1),
        "covered_first": float(a[in_b].sum() / max(a.sum(), 1)),
        "covered_second": float(b[in_a].sum() / max(b.sum(), 1)),
    }


def _differing(pieces: list[bytes], a: NDArray[np.int64], b: NDArray[np.int64], top: int) -> list[dict[str, Any]]:
    surprise = log_likelihood(a, b)
    order = [int(place) for place in np.argsort(-surprise, kind="stable")[:top] if surprise[place] > 1e-9]
    return [
        {
            "token": visible(pieces[place].decode(errors="backslashreplace")),
            "first": float(a[place] / max(a.sum(), 1)),
            "second": float(b[place] / max(b.sum(), 1)),
            "g2": round(float(surprise[place]), 3),
        }
        for place in order
    ]


def _spelled(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else f"{value:,.1f}".removesuffix(".0")
