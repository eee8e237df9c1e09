"""One shard in the making: blocks of documents written, counted and hashed as they come."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.files import json_line, sync
from megatron_vpmoe.token_files import TripleWriter
from vpmoe.data_curation.datasets.encode import Block, Documents
from vpmoe.data_curation.datasets.plan import SPLITS
from vpmoe.harmony.spans import SPAN_NAMES

HISTOGRAM_BINS = 64


def histogram_width(seq_len: int) -> int:
    """Tokens in one bin of the length histogram."""
    return -(-(seq_len + 1) // HISTOGRAM_BINS)


@dataclass
class SplitStats:
    """Sums over one split; ``histogram[b]`` counts documents of length in ``[b*w, (b+1)*w)``, w the bin width."""

    rows: int = 0
    tokens: int = 0
    span_tokens: list[int] = field(default_factory=lambda: [0] * len(SPAN_NAMES))
    longest: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * HISTOGRAM_BINS)

    def add(self, documents: Documents, width: int) -> None:
        """Count documents in; ``width`` is the bin's. Spans aligned to labels have the sums of spans of tokens."""
        spans = np.bincount(documents.span, minlength=len(SPAN_NAMES))
        bins = np.bincount(documents.lengths // width, minlength=HISTOGRAM_BINS)
        self.rows += len(documents.lengths)
        self.tokens += len(documents.tokens)
        self.span_tokens = (self.span_tokens + spans).tolist()
        self.longest = max(self.longest, int(documents.lengths.max()))
        self.histogram = (self.histogram + bins).tolist()


class ShardWriter:
    """Takes the blocks of one shard and writes their documents behind one another.

    Args:
        folder: of the dataset; the files go to ``<folder>/<split>``.
        name: of the shard.
        seq_len: longest document, which sets the histogram's bins.
        rejects: the file that lists the shard's rejected rows.
    """

    def __init__(self, folder: Path, name: str, seq_len: int, rejects: Path) -> None:
        self.name, self._folder, self._width = name, folder, histogram_width(seq_len)
        self._stats = {split: SplitStats() for split in SPLITS}
        self._writers: dict[str, TripleWriter] = {}
        self._rows_read, self._truncation, self._counted = 0, Counter[str](), Counter[str]()
        self._rejects, self._rejected = rejects.open("w", encoding="utf-8"), Counter[str]()

    def add(self, block: Block) -> None:
        """Append a block."""
        for split, parts in block.parts.items():
            if split not in self._writers:
                self._writers[split] = TripleWriter(self._folder / split / self.name)
            documents = Documents.joined(parts)
            self._writers[split].add(*documents)
            self._stats[split].add(documents, self._width)
        self._rows_read += block.rows_read
        self._truncation.update(block.truncation)
        self._counted.update(block.counted)
        self._rejected.update(reject["reason"] for reject in block.rejects)
        self._rejects.writelines(map(json_line, block.rejects))

    def flush_rejects(self) -> None:
        """Have the file of rejects list all that were added."""
        self._rejects.flush()

    def close(self) -> dict[str, Any]:
        """Finish the files, durably; returns the shard's record, whose files are relative to those of their split."""
        files = {split: writer.close() for split, writer in self._writers.items()}
        self._rejects.close()
        sync(Path(self._rejects.name))
        return {
            "name": self.name,
            "rows_read": self._rows_read,
            "splits": {split: {**asdict(stats), "files": files.get(split, {})} for split, stats in self._stats.items()},
            "truncation": dict(self._truncation),
            "counted": dict(self._counted),
            "rejects": dict(self._rejected),
        }
