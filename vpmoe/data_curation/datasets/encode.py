"""Rows as what is stored of them: documents of three aligned signals, blocks of documents, and what did not get in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpmoe.data_curation.rows.files import Row
from vpmoe.errors import RowError, TokenizerError
from vpmoe.tokenizer.interface import TokenArray


class Documents(NamedTuple):
    """Documents one behind the other, as they are stored.

    Attributes:
        tokens: int32 ``[sum of lengths]``.
        lossmask, span: uint8 ``[sum of lengths]``, aligned to labels: entry t describes token t+1, the last is 0.
        lengths: int64 ``[documents]``.
    """

    tokens: TokenArray
    lossmask: NDArray[np.uint8]
    span: NDArray[np.uint8]
    lengths: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[Documents]) -> Documents:
        """The documents of ``parts`` in their order."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a row.

    Attributes:
        split: where its documents go.
        documents: None where the row was left out.
        truncation, counted: names of what happened to it, with numbers to add.
    """

    split: str
    documents: Documents | None
    truncation: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that it is stored as."""
        return 0 if self.documents is None else len(self.documents.tokens)


class RowEncoder:
    """What makes documents of rows; base of one for each kind of dataset.

    Attributes:
        columns: those it reads; None: all.
    """

    columns: tuple[str, ...] | None = None

    def encode(self, row: Row) -> Encoded:
        """What becomes of the row; raises RowError or TokenizerError for one that is to be rejected."""
        raise NotImplementedError

    def take_state(self) -> bytes:
        """What has to be remembered of the rows since the last call, for a build that goes on after them."""
        return b""

    def restore(self, state: bytes) -> None:
        """Remember what :meth:`take_state` gave for one shard."""


@dataclass
class Block:
    """Rows of one shard that lie one behind the other, encoded.

    Attributes:
        shard: name of the shard that it belongs to.
        rows_read: rows that it was made of.
        parts: split -> documents.
        truncation, counted: as :class:`Encoded` has them, summed.
        rejects: rows that could not be encoded, as ``rejects.jsonl`` lists them.
        end: of the shard's last block, what its record holds besides the sums.
    """

    shard: str
    rows_read: int = 0
    parts: dict[str, list[Documents]] = field(default_factory=dict)
    truncation: Counter[str] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(len(documents.tokens) for parts in self.parts.values() for documents in parts)

    def add(self, encoded: Encoded) -> None:
        """Append what became of a row."""
        if encoded.documents is not None:
            self.parts.setdefault(encoded.split, []).append(encoded.documents)
        self.truncation.update(encoded.truncation)
        self.counted.update(encoded.counted)

    def reject(self, where: dict[str, Any], error: RowError | TokenizerError, excerpt: str) -> None:
        """List a row that could not be encoded: where it stands, why, and how it begins."""
        reason = error.reason if isinstance(error, RowError) else "untokenizable"
        self.rejects.append({**where, "reason": reason, "detail": error.what, "excerpt": excerpt})
