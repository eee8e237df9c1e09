"""One shard in the making: documents of several splits, buffered, written, counted, moved into place together."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.files import file_entry, move_into_place
from vpmoe.data_curation.datasets.plan import SPLITS, SplitStats, histogram_width
from vpmoe.data_curation.datasets.token_files import TripleWriter, file_names
from vpmoe.tokenizer.interface import TokenArray

_BUFFERED_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class LabelledDocument:
    """A document as it is stored, all ``[L]``: ids, and loss mask and span aligned to labels (last entry 0)."""

    tokens: TokenArray
    lossmask: NDArray[np.uint8]
    span: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Unit:
    """Documents of one row: one behind the other in one split of one shard."""

    split: str
    documents: tuple[LabelledDocument, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return sum(len(document.tokens) for document in self.documents)


class SequentialShard:
    """Takes units, writes them under ``scratch``, and at the end moves the files to where they belong.

    Args:
        name: of the shard.
        scratch: folder for files that are not whole yet.
        seq_len: longest document, which sets the histogram's bins.
    """

    def __init__(self, name: str, scratch: Path, seq_len: int) -> None:
        self.name, self.tokens = name, 0
        self._scratch, self._width = scratch, histogram_width(seq_len)
        self._stats = {split: SplitStats() for split in SPLITS}
        self._waiting: dict[str, list[LabelledDocument]] = {split: [] for split in SPLITS}
        self._waiting_tokens = 0
        self._writers: dict[str, TripleWriter] = {}

    def add(self, unit: Unit) -> None:
        """Append a unit's documents."""
        self._waiting[unit.split].extend(unit.documents)
        self._waiting_tokens += unit.tokens
        self.tokens += unit.tokens
        if self._waiting_tokens >= _BUFFERED_TOKENS:
            self._flush()

    def close(self, output_dir: Path) -> dict[str, Any]:
        """Write the indices and move the files to ``output_dir/<split>``; returns the receipt's entry of each split."""
        self._flush()
        entries = {}
        for split, stats in self._stats.items():
            files: dict[str, Any] = {}
            if split in self._writers:
                self._writers[split].close()
                folder = self._scratch / split
                files = {file: file_entry(folder / file) for file in file_names(self.name)}
                for file in files:
                    move_into_place(folder / file, output_dir / split / file)
            entries[split] = {**asdict(stats), "files": files}
        shutil.rmtree(self._scratch, ignore_errors=True)
        return entries

    def _flush(self) -> None:
        for split, documents in self._waiting.items():
            if not documents:
                continue
            if split not in self._writers:
                (self._scratch / split).mkdir(parents=True, exist_ok=True)
                self._writers[split] = TripleWriter(self._scratch / split / self.name)
            lengths = np.array([len(document.tokens) for document in documents], dtype=np.int64)
            span = np.concatenate([document.span for document in documents])
            self._writers[split].add(
                np.concatenate([document.tokens for document in documents]),
                np.concatenate([document.lossmask for document in documents]),
                span,
                lengths,
            )
            # Moved by one place within a document, the spans have the same sums.
            self._stats[split].add(SplitStats.of_documents(lengths, span, self._width))
            documents.clear()
        self._waiting_tokens = 0
