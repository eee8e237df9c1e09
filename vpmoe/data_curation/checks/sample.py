"""Lengths and token counts of a split, of every document or of documents taken evenly from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.token_files import read_triple
from vpmoe.errors import DataError
from vpmoe.harmony.spans import SPAN_NAMES

DEFAULT_DOCUMENTS = 100_000


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read of a split.

    Attributes:
        rows: documents of the split.
        lengths: for ``all`` of a document and each span: number of tokens in it -> documents read that have so many.
        token_counts: int64 ``[vocab_size]``, how often each id occurs in the documents read.
    """

    rows: int
    lengths: dict[str, Counter[int]]
    token_counts: NDArray[np.int64]

    @property
    def read(self) -> int:
        """Documents read."""
        return self.lengths["all"].total()

    @property
    def described(self) -> str:
        """How much was read, in words."""
        return f"all {self.read:,} documents" if self.read == self.rows else f"{self.read:,} of {self.rows:,} documents"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram: ``count`` values from ``low`` to ``high``, both included."""

    low: int
    high: int
    count: int


def split_entry(manifest: dict[str, Any], split: str) -> dict[str, Any]:
    """The manifest's entry of a split; raises :class:`DataError` if there is none of that name."""
    if split not in manifest["splits"]:
        raise DataError(f"no split {split!r}", source="--split", remedy=f"use one of {', '.join(manifest['splits'])}")
    return manifest["splits"][split]


def sample_split(
    folder: Path, manifest: dict[str, Any], split: str, limit: int = DEFAULT_DOCUMENTS, *, tokens: bool = True
) -> Sample:
    """Read up to ``limit`` documents, every n-th of the split; the same ones each time.

    Args:
        folder: the dataset.
        manifest: its manifest.
        split: ``train`` or ``valid``.
        limit: documents to read; 0 reads all of them.
        tokens: count ids too; without, ``token_counts`` is all zeros.

    Raises:
        DataError: no such split, a negative limit, or a damaged shard.
    """
    if limit < 0:
        raise DataError(f"{limit} documents", source="--sample", remedy="ask for at least 1, or 0 for all of them")
    entry = split_entry(manifest, split)
    stride = -(-entry["rows"] // limit) if limit else 1
    counts = np.zeros(manifest["tokenizer"]["vocab_size"], dtype=np.int64)
    lengths = {name: Counter[int]() for name in ("all", *SPAN_NAMES)}
    first = 0
    for shard in entry["shards"]:
        triple = read_triple(folder / split, shard["name"])
        for document in range(-first % stride, triple.documents, stride):
            place = triple.place(document)
            # An entry describes the next token and the last one nothing: the first token is the context it stands for.
            spans = np.bincount(triple.span[place], minlength=len(SPAN_NAMES)).tolist()
            for name, length in zip(lengths, (sum(spans), *spans), strict=False):
                lengths[name][length] += 1
            if tokens:
                ids, times = np.unique(triple.tokens[place], return_counts=True)
                if ids[0] < 0 or ids[-1] >= len(counts):
                    what = f"ids from {ids[0]} to {ids[-1]} in a vocabulary of {len(counts)}"
                    raise DataError(what, source=f"{split}/{shard['name']}", remedy=f"vpmoe data verify {folder}")
                counts[ids] += times
        first += triple.documents
    return Sample(entry["rows"], lengths, counts)


def histogram(lengths: Counter[int], bars: int) -> list[Bar]:
    """Lengths counted in at most ``bars`` bars of equal width, from the shortest to the longest; empty for none."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bars)
    counts = Counter[int]()
    for length, count in lengths.items():
        counts[(length - low) // width] += count
    return [Bar(low + at * width, low + (at + 1) * width - 1, counts[at]) for at in range(max(counts) + 1)]


def quantile(lengths: Counter[int], share: float) -> float | None:
    """The length that so large a share of the documents does not exceed, interpolated linearly; None for none."""
    if not lengths:
        return None
    values = np.array(sorted(lengths))
    ends = np.cumsum([lengths[int(value)] for value in values])
    place = share * (int(ends[-1]) - 1)
    below, above = (values[np.searchsorted(ends, at, side="right")] for at in (np.floor(place), np.ceil(place)))
    return float(below + (above - below) * (place - np.floor(place)))
