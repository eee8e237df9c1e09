"""Plain text as documents of the training format: every token supervised, no spans, <|endoftext|> at the end of each.

A document longer than a row becomes consecutive pieces; only the last ends in <|endoftext|>. A document whose
normalised text was seen before is left out.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vpmoe.data_curation.datasets.encode import Documents, Encoded, RowEncoder
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.rows.files import Row
from vpmoe.errors import DataError
from vpmoe.harmony.conversation import check_text
from vpmoe.tokenizer.interface import TokenArray, Tokenizer

KIND = "healing_text"
_DUPLICATE_RULE = "blake2b (8 bytes) of the text under NFKC, case folding, and runs of white space as one blank"
# Options of conversations, which plain text has not.
CONVERSATIONS_ALONE = ("renderer", "renderer_version", "compact_vocab_size")


@dataclass(frozen=True, slots=True)
class HealingText:
    """What decides a dataset of plain text.

    Attributes:
        step: what the keyed step makes.
        base: length, split, vocabulary and strictness.
        text_field: column of the text.
        id_field: column of the document's id, which then decides the split; None: the text decides.
        language_field: column that names the language; None: no filter.
        languages: values of that column to keep.
        drop_long: drop documents longer than a row; False: cut them into pieces.
    """

    step: ClassVar[str] = "text"

    base: BuildOptions
    text_field: str = "text"
    id_field: str | None = None
    language_field: str | None = None
    languages: tuple[str, ...] = ()
    drop_long: bool = False

    def __post_init__(self) -> None:
        if self.languages and self.language_field is None:
            raise DataError(
                f"no field says which documents are {', '.join(self.languages)}, and languages are not guessed",
                source="--language",
                remedy="name the column with --language-field, or leave --language out",
            )
        if self.language_field is not None and not self.languages:
            raise DataError(
                f"the language field {self.language_field!r} is named, but no language to keep",
                source="--language-field",
                remedy="pass --language too",
            )

    def config(self) -> dict[str, Any]:
        """Everything that decides bytes but the pass."""
        base = {key: value for key, value in self.base.as_manifest().items() if key not in CONVERSATIONS_ALONE}
        return {
            **base,
            "kind": KIND,
            "text_field": self.text_field,
            "id_field": self.id_field,
            **self.base.split_config(self.id_field),
            "language_field": self.language_field,
            "languages": list(self.languages),
            "long_documents": "dropped" if self.drop_long else "pieces",
            "duplicate_rule": _DUPLICATE_RULE,
        }

    def entries(self) -> dict[str, Any]:
        """There is no renderer and no conversation, and the split goes by document."""
        return {
            "kind": KIND,
            "renderer": None,
            "prompts": None,
            "split_rule": self.base.split_rule("document id, or its text where no id field is named"),
        }

    def encoder(self, tokenizer: Tokenizer) -> TextEncoder:
        """A fresh encoder, which has seen no text."""
        return TextEncoder(self, tokenizer)


class TextEncoder(RowEncoder):
    """Rows -> documents; remembers the hash of every text and id."""

    def __init__(self, kind: HealingText, tokenizer: Tokenizer) -> None:
        super().__init__(kind.base, kind.id_field)
        self._kind, self._tokenizer = kind, tokenizer
        named = (kind.text_field, kind.id_field, kind.language_field, kind.base.split_field)
        self.columns = tuple(dict.fromkeys(filter(None, named)))

    def _encode(self, row: Row) -> Encoded:
        """The row's document, or its pieces; none for a duplicate, another language, or one too long to keep.

        Raises:
            RowError: a named field is missing or blank, not UTF-8, or holds NUL.
            TokenizerError: the text cannot be split.
        """
        kind, seq_len = self._kind, self._kind.base.seq_len
        text = _text_in(row, kind.text_field)
        split, counted = self._split_of(row, text)
        if kind.language_field is not None and _text_in(row, kind.language_field) not in kind.languages:
            return Encoded(split, None, counted={**counted, "other_language": 1})
        if self._is_known(text_hash(text)):
            return Encoded(split, None, counted={**counted, "duplicates_dropped": 1})
        ids = np.append(self._tokenizer.encode_ordinary(text), np.int32(self._tokenizer.eod_id)).astype(np.int32)
        if kind.drop_long and len(ids) > seq_len:
            return Encoded(split, None, {"dropped_too_long": 1}, counted)
        return in_pieces(split, ids, seq_len, counted)


def text_hash(text: str) -> int:
    """Equal for texts that differ only in case, compatibility forms of characters, and white space; 64 bits."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "big")


def cut(ids: TokenArray, seq_len: int) -> list[TokenArray]:
    """Consecutive pieces of at most ``seq_len`` ids, none of a single id (nothing could be predicted in it)."""
    pieces = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [ids[-seq_len - 1 : -2], ids[-2:]]
    return pieces


def in_pieces(split: str, ids: TokenArray, seq_len: int, counted: dict[str, int]) -> Encoded:
    """A document to keep: whole, or cut; ``counted`` is told besides."""
    pieces = cut(ids, seq_len)
    told = {"whole": 1} if len(pieces) == 1 else {"cut_into_pieces": 1, "pieces": len(pieces)}
    return Encoded(split, _supervised(pieces), told, {**counted, "kept": 1})


def _supervised(pieces: list[TokenArray]) -> Documents:
    """Pieces as documents of which every label counts: all but the last of each."""
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    lossmask = np.ones(lengths.sum(), dtype=np.uint8)
    lossmask[np.cumsum(lengths) - 1] = 0
    return Documents(np.concatenate(pieces), lossmask, np.zeros(len(lossmask), dtype=np.uint8), lengths)


def _text_in(row: Row, field: str) -> str:
    check_text(row.get(field), field)
    return str(row[field])
