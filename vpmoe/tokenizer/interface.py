"""What every vocabulary of the project offers; renderer, builder and evaluation see nothing else of it."""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vpmoe.errors import TokenizerError

TokenArray = NDArray[np.int32]


class Tokenizer(Protocol):
    """Ids of ordinary text, ids of special tokens by name, and the way back.

    Text is always encoded as ordinary text: a spelling such as ``<|end|>`` inside it gives ordinary tokens, never the
    special id. Special ids enter a sequence by name only.
    """

    @property
    def name(self) -> str:
        """``o200k_harmony`` or ``o200k_harmony_compact``."""
        ...

    @property
    def rank_file_sha256(self) -> str:
        """Hash of the rank file below this vocabulary."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids that mean something: ``0 .. vocab_size-1``."""
        ...

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding; ids from ``vocab_size`` on never occur."""
        ...

    @property
    def eod_id(self) -> int:
        """Id of ``<|endoftext|>``, which ends every document."""
        ...

    @property
    def first_special_id(self) -> int:
        """Every id from here to ``vocab_size - 1`` is a special token, and none below is."""
        ...

    @property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of Harmony's named special tokens."""
        ...

    def special_id(self, spelling: str) -> int:
        """Id of one special token.

        Raises:
            TokenizerError: the vocabulary has no such special token.
        """
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special token (reserved ones included)."""
        ...

    def encode_ordinary(self, text: str) -> TokenArray:
        """Ids of ``text`` as ordinary text, int32 ``[n]``.

        Raises:
            TokenizerError: the text holds a lone surrogate, so it has no UTF-8 form.
        """
        ...

    def encode_ordinary_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """:meth:`encode_ordinary` of each text."""
        ...

    def from_o200k(self, ids: Sequence[int] | TokenArray) -> TokenArray:
        """Ids of the full vocabulary (special ids allowed) in this vocabulary's ids, int32."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind ``ids``; a special token gives its spelling.

        Raises:
            TokenizerError: an id at or above ``vocab_size`` or below 0.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """:meth:`decode_bytes` as text; bytes that are not UTF-8 become U+FFFD."""
        ...

    def pieces(self) -> list[bytes]:
        """Bytes of every id, ``padded_vocab_size`` of them; padding ids are empty."""
        ...


def no_utf8_form(text: str, error: UnicodeEncodeError) -> TokenizerError:
    """The error that a lone surrogate in ``text`` is."""
    return TokenizerError(
        f"text has no UTF-8 form: {error.reason} at character {error.start}",
        source=repr(text[max(0, error.start - 20) : error.end + 20]),
        remedy="reject the row, or repair the text where it is made",
    )


class PieceVocabulary:
    """What every vocabulary does alike once it has ids, pieces and ``encode_ordinary``; base of the classes."""

    name: str
    vocab_size: int
    first_special_id: int

    def is_special(self, token_id: int) -> bool:
        """Whether ``token_id`` is a special token: these have the highest ids."""
        return self.first_special_id <= token_id < self.vocab_size

    def encode_ordinary(self, text: str) -> TokenArray:
        """As :class:`Tokenizer` has it."""
        raise NotImplementedError

    def encode_ordinary_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """:meth:`encode_ordinary` of each text (a thread pool is slower than this loop on short texts)."""
        return [self.encode_ordinary(text) for text in texts]

    def pieces(self) -> list[bytes]:
        """As :class:`Tokenizer` has it."""
        raise NotImplementedError

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


def pieces_file_bytes(tokenizer: Tokenizer) -> bytes:
    """Content of ``token_pieces.txt``: line i is the base64 of the bytes of id i, an empty line for a padding id."""
    return b"".join(map(binascii.b2a_base64, tokenizer.pieces()))
