"""One split of a built dataset: shards of Megatron-Core IndexedDatasets, opened by the manifest.

Opening checks everything that can be checked without reading the tokens of a corpus, so that a dataset that cannot be
trained on stops the run in seconds. Whatever needs the tokens themselves is checked as they are read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.annotations import Late
from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.data.shard import Shard, check_files, check_ids
from megatron_vpmoe.errors import DataError, TokenizerError
from megatron_vpmoe.manifest import Manifest, read_manifest
from megatron_vpmoe.token_files import REBUILD
from megatron_vpmoe.turns import MESSAGE_END, TURN_END

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

SCANNED_TOKENS = 1 << 22
"""Tokens of each shard whose ids are checked on opening, from its start (16 MB; all of a small dataset)."""


class KDDataset:
    """The conversations of one split, in the order of the files. Indexing reads one conversation (memory-mapped).

    Args:
        manifest: of the dataset.
        split: "train" or "valid".
        seq_length: longest conversation that a row can hold, in tokens.

    Attributes:
        lengths: int32 [n]; tokens of each conversation.
        records: a teacher's, as declared; NO_RECORD everywhere where the dataset has none and is told of others'.

    Raises:
        DataError: the split is absent or empty, a file is missing or of the wrong size, the three parts of a shard
            disagree, a conversation is longer than ``seq_length``, or a token id is outside the vocabulary.
    """

    lengths: NDArray[np.int32]

    def __init__(self, manifest: Manifest, split: str, *, seq_length: int) -> None:
        self.manifest, self.split, self.records = manifest, split, manifest.teacher
        entry = manifest.splits.get(split)
        if entry is None or entry.rows == 0:
            raise DataError(
                f"the split {split!r} has no conversations",
                source=f"{manifest.path}: splits.{split}",
                remedy="build from more rows, or raise --valid-fraction if it is the validation split",
            )
        folder = manifest.root / split
        for shard in entry.shards:
            check_files(folder, shard, manifest.stored)
        # The builder may leave a shard without rows; an empty file cannot be memory-mapped.
        kept = (manifest.stored, manifest.teacher)
        self._shards = [Shard(folder, shard, *kept) for shard in entry.shards if shard.rows]
        self.lengths = np.concatenate([shard.lengths for shard in self._shards])
        self._first_row = np.cumsum([0, *(len(shard.lengths) for shard in self._shards)])
        if len(self.lengths) != entry.rows:
            raise DataError(
                f"the manifest counts {entry.rows} conversations, the shards hold {len(self.lengths)}",
                source=f"{manifest.path}: splits.{split}.rows",
                remedy=REBUILD,
            )
        self._check_lengths(seq_length)
        special = manifest.tokenizer.special_tokens
        self._ends = (special[MESSAGE_END], special[TURN_END]) if {MESSAGE_END, TURN_END} <= special.keys() else None
        for shard in self._shards:
            check_ids(shard.first_tokens(SCANNED_TOKENS), manifest.tokenizer.vocab_size, shard.source)

    @classmethod
    def open(cls, data_path: Path | str, split: str, *, seq_length: int, padded_vocab_size: int) -> KDDataset:
        """Read the manifest of ``data_path`` and open a split for a model with ``padded_vocab_size`` embedding rows.

        Raises:
            TokenizerError: the dataset's vocabulary is not the model's.
            DataError: as the class says.
        """
        manifest = read_manifest(data_path)
        check_vocabulary(manifest, padded_vocab_size)
        return cls(manifest, split, seq_length=seq_length)

    @classmethod
    def open_at(cls, data_path: Path | str, cfg: RunConfig, split: str) -> KDDataset:
        """``open`` with ``data.seq_length`` and ``model.padded_vocab_size``."""
        return cls.open(data_path, split, seq_length=cfg.data.seq_length, padded_vocab_size=cfg.model.padded_vocab_size)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        """Conversation ``index``, 0 <= index < len(self)."""
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)} in split {self.split!r}")
        number = int(np.searchsorted(self._first_row, index, side="right")) - 1
        shard, row = self._shards[number], int(index - self._first_row[number])
        document = shard.document(row)
        check_ids(document.tokens, self.manifest.tokenizer.vocab_size, f"{shard.source}, row {row}")
        if self.records is not None and self.manifest.teacher is None:
            nothing = partial(self.records.of_document, np.empty(0, np.uint8), document.loss_mask, shard.source)
            document = replace(document, annotations=Late(document.annotations, self.records.annotations, nothing))
        return replace(document, ends=self._ends)

    @property
    def annotations(self) -> tuple[Annotation, ...]:
        """That every document carries."""
        told = self.records if self.manifest.teacher is None else None
        return (*self.manifest.annotations, *(told.annotations if told is not None else ()))

    def longer_prompts(self, count: int) -> list[int]:
        """Conversations whose prompt has more than ``count`` tokens; only of those that are longer is any byte read."""
        return [
            int(first + row)
            for shard, first in zip(self._shards, self._first_row, strict=False)
            for row in np.flatnonzero(shard.lengths > count)
            if not shard.answers_within(int(row), count)
        ]

    @property
    def eod_id(self) -> int:
        """The end-of-document token."""
        return self.manifest.tokenizer.eod_id

    def _check_lengths(self, seq_length: int) -> None:
        too_long = np.flatnonzero(self.lengths > seq_length)
        if too_long.size:
            index = int(too_long[0])
            raise DataError(
                f"{too_long.size} conversations are longer than seq_length {seq_length}; "
                f"the first, number {index}, has {self.lengths[index]} tokens",
                source=f"{self.manifest.root / self.split} (built for seq_length {self.manifest.seq_length})",
                remedy=f"set --seq-length {self.lengths.max()} or more, or rebuild with --seq-len {seq_length}",
            )


def check_vocabulary(manifest: Manifest, padded_vocab_size: int) -> None:
    """Refuse a model whose embedding is not of the dataset's size.

    Raises:
        TokenizerError: the sizes differ; a larger model would train too, but on ids of another meaning than it was
            made for.
    """
    tokenizer = manifest.tokenizer
    if tokenizer.padded_vocab_size != padded_vocab_size:
        raise TokenizerError(
            f"the model has padded_vocab_size {padded_vocab_size}, "
            f"the dataset's vocabulary {tokenizer.name} has {tokenizer.padded_vocab_size}",
            source=f"{manifest.path}: tokenizer.padded_vocab_size",
            remedy=f"set --padded-vocab-size {tokenizer.padded_vocab_size}, or point --data-path to another dataset",
        )
