"""What every vocabulary of the project offers; renderer, builder and evaluation see nothing else of it."""

from __future__ import annotations

import binascii
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.manifest import VocabularyEntry
from vpmoe.errors import TokenizerError

TokenArray = NDArray[np.int32]


class Tokenizer(ABC):
    """Ids of ordinary text, ids of special tokens by name, and the way back.

    Text is always encoded as ordinary text: a spelling such as ``<|end|>`` inside it gives ordinary tokens, never the
    special id. Special ids enter a sequence by name only.

    Attributes:
        name: of the kind of vocabulary, such as ``o200k_harmony``.
        source: where it was read, for messages.
        rank_file_sha256: hash of the file below this vocabulary.
        vocab_size: number of ids that mean something: ``0 .. vocab_size-1``.
        padded_vocab_size: rows of the embedding; ids from ``vocab_size`` on never occur.
        eod_id: id of ``<|endoftext|>``, which ends every document.
        first_special_id: every id from here to ``vocab_size - 1`` is a special token, and none below is.
        special_tokens: spelling -> id of the named special tokens.
    """

    name: str
    source: str
    rank_file_sha256: str
    vocab_size: int
    padded_vocab_size: int
    eod_id: int
    first_special_id: int
    special_tokens: dict[str, int]

    @abstractmethod
    def encode_ordinary(self, text: str) -> TokenArray:
        """Ids of ``text`` as ordinary text, int32 ``[n]``.

        Raises:
            TokenizerError: the text holds a lone surrogate, so it has no UTF-8 form.
        """

    @abstractmethod
    def from_o200k(self, ids: Sequence[int] | TokenArray) -> TokenArray:
        """Ids of the full o200k Harmony vocabulary (special ids allowed) in this vocabulary's ids, int32.

        Raises:
            TokenizerError: they have no form here.
        """

    @abstractmethod
    def pieces(self) -> list[bytes]:
        """Bytes of every id, ``padded_vocab_size`` of them; a special token gives its spelling, padding is empty."""

    @property
    def entry(self) -> dict[str, Any]:
        """What a manifest says of it, but for the files that carry it."""
        names = ("name", "rank_file_sha256", "vocab_size", "padded_vocab_size", "eod_id", "special_tokens")
        return {**{name: getattr(self, name) for name in names}, "compact_map": None}

    @property
    def identity(self) -> dict[str, str]:
        """See :meth:`~megatron_vpmoe.manifest.VocabularyEntry.identity`."""
        return VocabularyEntry.model_validate(self.entry).identity()

    def special_id(self, spelling: str) -> int:
        """Id of a named special token; raises :class:`TokenizerError` if the vocabulary has none so spelled."""
        if spelling not in self.special_tokens:
            raise TokenizerError(
                f"{spelling!r} is no special token of this vocabulary",
                source=self.source,
                remedy=f"use one of {', '.join(self.special_tokens) or 'none: it has no special tokens'}",
            )
        return self.special_tokens[spelling]

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special token (reserved ones included)."""
        return self.first_special_id <= token_id < self.vocab_size

    @cached_property
    def _pieces(self) -> list[bytes]:
        return self.pieces()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ``ids``; raises :class:`TokenizerError` for an id outside the vocabulary."""
        pieces, out = self._pieces, list[bytes]()
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise TokenizerError(
                    f"token id {int(token_id)} is outside the vocabulary of {self.vocab_size} ids",
                    source=self.name,
                    remedy="decode with the dataset's own tokenizer (vpmoe.tokenizer.load_tokenizer)",
                )
            out.append(pieces[token_id])
        return b"".join(out)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")


def no_utf8_form(text: str, error: UnicodeEncodeError) -> TokenizerError:
    """The error that a lone surrogate in ``text`` is."""
    return TokenizerError(
        f"text has no UTF-8 form: {error.reason} at character {error.start}",
        source=repr(text[max(0, error.start - 20) : error.end + 20]),
        remedy="reject the row, or repair the text where it is made",
    )


def pieces_file_bytes(tokenizer: Tokenizer) -> bytes:
    """Content of ``token_pieces.txt``: line i is the base64 of the bytes of id i, an empty line for a padding id."""
    return b"".join(map(binascii.b2a_base64, tokenizer.pieces()))
