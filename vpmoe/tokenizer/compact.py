"""Compact vocabularies: the ids that a corpus uses often, the 256 byte tokens and the special tokens, nothing else.

Any other id of the full vocabulary is spelled as its byte tokens, so every text still encodes and decodes to itself.
A model of a few million parameters can then read real Harmony text without 201,088 rows of embedding and of logits.
The map is one int32 array: ``o200k_ids[compact id] = id in the full vocabulary``, strictly increasing, so that the byte
tokens (full ids 0..255) come first and the special tokens last.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.files import write_atomically
from vpmoe.errors import TokenizerError
from vpmoe.tokenizer.interface import TokenArray, Tokenizer
from vpmoe.tokenizer.o200k_harmony import FIRST_SPECIAL_ID, NAMED_SPECIAL_TOKENS, VOCAB_SIZE, O200kHarmony

NAME = "o200k_harmony_compact"
MAP_NAME = "compact_vocab.npy"
BYTE_TOKENS = 256
FIXED_IDS = BYTE_TOKENS + len(NAMED_SPECIAL_TOKENS)
DEFAULT_PADDING_MULTIPLE = 128


class CompactVocabulary(Tokenizer):
    """A vocabulary cut out of o200k Harmony.

    Args:
        full: the vocabulary it is cut from.
        o200k_ids: ``[vocab_size]``, the full id of each compact id, strictly increasing; holds all byte tokens and all
            named special tokens.
        padded_vocab_size: embedding rows; None rounds up to a multiple of 128.

    Raises:
        TokenizerError: the map is not such an array, or the padded size is below the vocabulary's.
    """

    name = NAME

    def __init__(
        self, full: O200kHarmony, o200k_ids: NDArray[np.integer], padded_vocab_size: int | None = None
    ) -> None:
        self.full, self.source = full, full.source
        self.o200k_ids = _checked_map(o200k_ids)
        self.vocab_size = len(self.o200k_ids)
        self.first_special_id = self.vocab_size - len(NAMED_SPECIAL_TOKENS)
        self.padded_vocab_size = padded_size(self.vocab_size, padded_vocab_size)
        self.rank_file_sha256 = full.rank_file_sha256
        self._compact_of = np.full(VOCAB_SIZE, -1, dtype=np.int32)
        self._compact_of[self.o200k_ids] = np.arange(self.vocab_size, dtype=np.int32)
        self.special_tokens = {name: int(self._compact_of[i]) for name, i in NAMED_SPECIAL_TOKENS.items()}
        self.eod_id = self.special_tokens["<|endoftext|>"]

    @classmethod
    def from_counts(
        cls,
        full: O200kHarmony,
        counts: NDArray[np.integer],
        *,
        max_size: int | None = None,
        min_count: int = 1,
        padded_vocab_size: int | None = None,
    ) -> CompactVocabulary:
        """Keep the ids seen at least ``min_count`` times, the most frequent first, up to ``max_size`` ids in all.

        Args:
            full: the vocabulary it is cut from.
            counts: ``[201088]``, how often the corpus uses each full id.
            max_size: size of the vocabulary, byte and special tokens included; None keeps all that ``min_count`` lets.
            min_count: ids seen less often are spelled as bytes.
            padded_vocab_size: as in the constructor.

        Raises:
            TokenizerError: ``max_size`` cannot hold the 256 byte and 9 special tokens, or ``counts`` has another shape.
        """
        if counts.shape != (VOCAB_SIZE,):
            raise TokenizerError(f"counts have shape {counts.shape}, expected ({VOCAB_SIZE},)", source="id counts")
        if max_size is not None and max_size < FIXED_IDS:
            raise TokenizerError(
                f"a compact vocabulary of {max_size} ids cannot hold the {FIXED_IDS} byte and special tokens",
                source="--compact-vocab-size",
                remedy=f"ask for at least {FIXED_IDS}",
            )
        ordinary = np.arange(BYTE_TOKENS, FIRST_SPECIAL_ID)
        ordinary = ordinary[counts[ordinary] >= max(1, min_count)]
        by_frequency = ordinary[np.lexsort((ordinary, -counts[ordinary]))]
        kept = by_frequency if max_size is None else by_frequency[: max_size - FIXED_IDS]
        fixed = [*range(BYTE_TOKENS), *NAMED_SPECIAL_TOKENS.values()]
        return cls(full, np.sort(np.concatenate([kept, fixed])).astype(np.int32), padded_vocab_size)

    @classmethod
    def load(
        cls, full: O200kHarmony, path: Path, *, sha256: str | None = None, padded_vocab_size: int | None = None
    ) -> CompactVocabulary:
        """Read a map written by :meth:`save`; with ``sha256`` the file has to have that hash."""
        if not path.is_file():
            raise TokenizerError(
                f"no compact map at {path}", source="compact map", remedy="build one with --compact-vocab-size N"
            )
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if sha256 is not None and found != sha256:
            raise TokenizerError(
                f"the compact map's sha256 is {found}, the manifest says {sha256}",
                source=str(path),
                remedy="rebuild the dataset, or restore the map it was built with",
            )
        try:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except ValueError as error:
            raise TokenizerError(f"not a .npy array: {error}", source=str(path), remedy="rebuild the map") from error
        vocabulary = cls(full, array, padded_vocab_size)
        vocabulary.sha256 = found
        return vocabulary

    @property
    def entry(self) -> dict[str, Any]:
        """As :class:`Tokenizer` has it, with the map's hash."""
        return {**super().entry, "compact_map": {"path": MAP_NAME, "sha256": self.sha256}}

    @cached_property
    def file_bytes(self) -> bytes:
        """The map as a ``.npy`` file."""
        stream = io.BytesIO()
        np.save(stream, self.o200k_ids, allow_pickle=False)
        return stream.getvalue()

    @cached_property
    def sha256(self) -> str:
        """Hash of the file that the map was read from, else of :attr:`file_bytes`."""
        return hashlib.sha256(self.file_bytes).hexdigest()

    def save(self, path: Path) -> str:
        """Write the map atomically; returns its sha256."""
        write_atomically(path, self.file_bytes)
        return self.sha256

    @cached_property
    def _spelling(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """``(length, start, flat)``: id i is spelled ``flat[start[i] : start[i] + length[i]]``; length 0: refused."""
        pieces = self.full.pieces()
        byte_id = {piece: int(self._compact_of[i]) for i, piece in enumerate(pieces[:BYTE_TOKENS])}
        of_byte = np.array([byte_id[bytes([value])] for value in range(BYTE_TOKENS)], dtype=np.int32)
        kept = self._compact_of >= 0
        length = np.ones(VOCAB_SIZE, dtype=np.int64)
        spelled = np.flatnonzero(~kept[:FIRST_SPECIAL_ID])
        length[spelled] = [len(pieces[i]) for i in spelled]
        length[FIRST_SPECIAL_ID:][~kept[FIRST_SPECIAL_ID:]] = 0
        start = np.concatenate([[0], np.cumsum(length)[:-1]])
        flat = np.empty(int(length.sum()), dtype=np.int32)
        flat[start[kept]] = self._compact_of[kept]
        in_bytes = np.repeat(~kept, length)
        flat[in_bytes] = of_byte[np.frombuffer(b"".join(pieces[i] for i in spelled), dtype=np.uint8)]
        return length, start, flat

    def from_o200k(self, ids: Sequence[int] | TokenArray) -> TokenArray:
        """Compact ids of full ids, int32; an id that was not kept becomes its byte tokens.

        Raises:
            TokenizerError: a special id that compact vocabularies do not have (the reserved ones).
        """
        full_ids = np.asarray(ids, dtype=np.int64)
        compact = self._compact_of[full_ids]
        if not (compact < 0).any():
            return compact
        length, start, flat = self._spelling
        repeats = length[full_ids]
        if (repeats == 0).any():
            raise TokenizerError(
                f"special id {int(full_ids[repeats == 0][0])} is not in the compact vocabulary",
                source=self.name,
                remedy=f"use one of {', '.join(NAMED_SPECIAL_TOKENS)}",
            )
        before = np.cumsum(repeats) - repeats
        return flat[np.repeat(start[full_ids] - before, repeats) + np.arange(repeats.sum())]

    def encode_ordinary(self, text: str) -> TokenArray:
        """As of the full vocabulary, ids that were not kept spelled in bytes."""
        return self.from_o200k(self.full.encode_ordinary(text))

    def pieces(self) -> list[bytes]:
        """Those of the kept ids, and the padding."""
        full = self.full.pieces()
        return [full[i] for i in self.o200k_ids] + [b""] * (self.padded_vocab_size - self.vocab_size)


def padded_size(vocab_size: int, asked: int | None, multiple: int = DEFAULT_PADDING_MULTIPLE) -> int:
    """Embedding rows for ``vocab_size`` ids: ``asked``, or the next multiple of ``multiple``.

    Raises:
        TokenizerError: ``asked`` is below ``vocab_size``.
    """
    if asked is None:
        return -(-vocab_size // multiple) * multiple
    if asked < vocab_size:
        raise TokenizerError(
            f"padded vocabulary size {asked} is below the vocabulary's {vocab_size} ids",
            source="--padded-vocab-size",
            remedy=f"ask for at least {vocab_size}, or for a smaller --compact-vocab-size",
        )
    return asked


def _checked_map(array: NDArray[np.integer]) -> NDArray[np.int32]:
    fault = None
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        fault = f"has shape {array.shape} and dtype {array.dtype}, expected one dimension of integers"
    elif len(array) == 0 or array[0] < 0 or array[-1] >= VOCAB_SIZE or (np.diff(array) <= 0).any():
        fault = f"is not strictly increasing within 0..{VOCAB_SIZE - 1}"
    elif missing := set([*range(BYTE_TOKENS), *NAMED_SPECIAL_TOKENS.values()]) - set(array.tolist()):
        fault = f"lacks {len(missing)} byte or special tokens, for one id {min(missing)}"
    elif (extra := set(array[array >= FIRST_SPECIAL_ID].tolist()) - set(NAMED_SPECIAL_TOKENS.values())) != set():
        fault = f"holds reserved special ids, for one {min(extra)}"
    if fault:
        raise TokenizerError(
            f"the compact map {fault}", source="compact map", remedy="build it with --compact-vocab-size"
        )
    return array.astype(np.int32)
