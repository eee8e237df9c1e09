"""Lengths and token counts of a split, of every document or of documents taken evenly from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpmoe.data_curation.datasets.token_files import read_triple
from vpmoe.errors import DataError
from vpmoe.harmony.spans import SPAN_NAMES

DEFAULT_DOCUMENTS = 100_000


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read of a split.

    Attributes:
        rows: documents of the split.
        spans: int64 ``[documents read, 3]``, tokens of each document in context, analysis and final.
        token_counts: int64 ``[vocab_size]``, how often each id occurs in the documents read.
    """

    rows: int
    spans: NDArray[np.int64]
    token_counts: NDArray[np.int64]

    @property
    def lengths(self) -> dict[str, NDArray[np.int64]]:
        """Tokens a document: in ``all`` and in each span."""
        return {"all": self.spans.sum(axis=1), **dict(zip(SPAN_NAMES, self.spans.T, strict=True))}

    @property
    def described(self) -> str:
        """How much was read, in words."""
        read = len(self.spans)
        return f"all {read:,} documents" if read == self.rows else f"{read:,} of {self.rows:,} documents"


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
    spans: list[NDArray[np.int64]] = []
    first = 0
    for shard in entry["shards"]:
        triple = read_triple(folder / split, shard["name"])
        for document in range(-first % stride, triple.documents, stride):
            begin, end = triple.bounds[document], triple.bounds[document + 1]
            # An entry describes the next token and the last one nothing: the first token is the context it stands for.
            spans.append(np.bincount(triple.span[begin:end], minlength=len(SPAN_NAMES)))
            if tokens:
                ids, times = np.unique(triple.tokens[begin:end], return_counts=True)
                counts[ids] += times
        first += triple.documents
    return Sample(entry["rows"], np.array(spans, dtype=np.int64).reshape(-1, len(SPAN_NAMES)), counts)


def histogram(lengths: NDArray[np.int64], bars: int) -> list[Bar]:
    """Lengths counted in at most ``bars`` bars of equal width, from the shortest to the longest; empty for none."""
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // bars)
    counts = np.bincount((lengths - low) // width)
    return [Bar(low + at * width, low + (at + 1) * width - 1, int(count)) for at, count in enumerate(counts)]
