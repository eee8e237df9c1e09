"""Rows as what is stored of them: documents of three aligned signals, blocks of documents, and what did not get in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpmoe.data_curation.datasets.plan import SPLITS, BuildOptions, split_of
from vpmoe.data_curation.rows.files import Row
from vpmoe.errors import RowError, TokenizerError
from vpmoe.harmony.conversation import check_text
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

    It remembers hashes of what must not come twice: 8 bytes each, those of the shard in work about 60.

    Args:
        base: how rows are split.
        id_field: column of the row's id, which decides the split where no column says it; None: its content does.

    Attributes:
        columns: those it reads; None: all.
    """

    columns: tuple[str, ...] | None = None

    def __init__(self, base: BuildOptions, id_field: str | None) -> None:
        self._id_field, self._valid_fraction, self._split_field = id_field, base.valid_fraction, base.split_field
        self._seen_before = np.empty(0, dtype=np.uint64)
        self._seen_now: set[int] = set()

    def encode(self, row: Row) -> Encoded:
        """What becomes of the row; raises RowError or TokenizerError for one that is to be rejected."""
        if self._split_field is not None:
            check_text(told := row.get(self._split_field), self._split_field)
            if told not in SPLITS:
                return Encoded(str(told), None, counted={"other_split": 1})
        return self._encode(row)

    def _encode(self, row: Row) -> Encoded:
        """:meth:`encode` of a row that is of a split."""
        raise NotImplementedError

    def take_state(self) -> bytes:
        """The hashes since the last call, sorted, uint64: for a build that goes on after them."""
        new = np.sort(np.fromiter(self._seen_now, dtype=np.uint64, count=len(self._seen_now)))
        self._seen_now.clear()
        self._seen_before = np.union1d(self._seen_before, new)
        return new.tobytes()

    def restore(self, state: bytes) -> None:
        """Remember what :meth:`take_state` gave for one shard."""
        self._seen_before = np.union1d(self._seen_before, np.frombuffer(state, dtype=np.uint64))

    def _is_known(self, key: int) -> bool:
        place = int(np.searchsorted(self._seen_before, np.uint64(key)))
        if key in self._seen_now or (place < len(self._seen_before) and int(self._seen_before[place]) == key):
            return True
        self._seen_now.add(key)
        return False

    def _split_of(self, row: Row, content: str) -> tuple[str, dict[str, int]]:
        """The row's split, and the count of its id where a row before has the same; raises RowError for no id."""
        key, repeated = content, False
        if self._id_field is not None:
            value = row.get(self._id_field)
            check_text(key := str(value) if isinstance(value, int) else value, self._id_field)
            digest = hashlib.blake2b(str(key).encode(), digest_size=8, person=b"id").digest()
            repeated = self._is_known(int.from_bytes(digest, "big"))
        split = split_of(str(key), self._valid_fraction) if self._split_field is None else row[self._split_field]
        return split, {"repeated_ids": 1} if repeated else {}


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
