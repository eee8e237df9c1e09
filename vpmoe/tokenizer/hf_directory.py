"""A vocabulary that lies in an HF directory as ``tokenizer.json``: a byte-level BPE, as Qwen's is.

For plain text only: it has no Harmony tokens, so no conversation can be rendered with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megatron_vpmoe.files import sha256_of_file
from megatron_vpmoe.manifest import HF_TOKENIZER
from vpmoe.errors import TokenizerError
from vpmoe.tokenizer.compact import padded_size
from vpmoe.tokenizer.interface import TokenArray, Tokenizer, no_utf8_form

FILE_NAME = "tokenizer.json"
FILE_NAMES = (
    FILE_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
END_OF_DOCUMENT = "<|endoftext|>"


class HFDirectory(Tokenizer):
    """The tokenizer of an HF directory, for plain text.

    Added tokens (``<|im_start|>``, ``<think>``) are never read out of a text: their spelling gives ordinary ids.

    Args:
        folder: holds ``tokenizer.json``.
        padded_vocab_size: embedding rows; None rounds up to a multiple of 128.
        sha256: hash that ``tokenizer.json`` has to have; None: any.

    Raises:
        TokenizerError: no such file, no byte-level BPE, added tokens that do not follow the ordinary ones, no
            ``<|endoftext|>``, or another hash.
    """

    name = HF_TOKENIZER

    def __init__(self, folder: Path, padded_vocab_size: int | None = None, *, sha256: str | None = None) -> None:
        self.folder = folder
        path = folder / FILE_NAME
        self.source = str(path)
        content = _read(path)
        self.rank_file_sha256 = sha256_of_file(path)
        if sha256 is not None and self.rank_file_sha256 != sha256:
            raise TokenizerError(
                f"the tokenizer's sha256 is {self.rank_file_sha256}, the manifest says {sha256}",
                source=str(path),
                remedy="restore the file that the dataset was built with, or build the dataset again",
            )
        self.special_tokens: dict[str, int] = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        ordinary = {text: row for text, row in content["model"]["vocab"].items() if text not in self.special_tokens}
        self.first_special_id = len(ordinary)
        self.vocab_size = len(ordinary) + len(self.special_tokens)
        if sorted([*ordinary.values(), *self.special_tokens.values()]) != list(range(self.vocab_size)) or (
            min(self.special_tokens.values(), default=self.vocab_size) != self.first_special_id
        ):
            raise TokenizerError(
                "ids have gaps, or added tokens stand among the ordinary ones",
                source=str(path),
                remedy="use a vocabulary whose added tokens follow the others, as Qwen's do",
            )
        self.eod_id = self.special_id(END_OF_DOCUMENT)
        self.padded_vocab_size = padded_size(self.vocab_size, padded_vocab_size)
        self._ordinary = ordinary
        self._encoding = tokenizers.Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))

    @property
    def files(self) -> list[Path]:
        """The tokenizer's files, by name."""
        return [self.folder / name for name in FILE_NAMES if (self.folder / name).is_file()]

    def encode_ordinary(self, text: str) -> TokenArray:
        """Ids of ``text`` as ordinary text, int32 ``[n]``; raises :class:`TokenizerError` for a lone surrogate."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise no_utf8_form(text, error) from error
        return np.array(self._encoding.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def from_o200k(self, ids: Sequence[int] | TokenArray) -> TokenArray:
        """Raises :class:`TokenizerError`: this vocabulary is no part of o200k Harmony."""
        raise TokenizerError(
            f"{len(ids)} ids of o200k_harmony have no form in this vocabulary",
            source=self.source,
            remedy="build conversations with o200k_harmony or a compact vocabulary of it",
        )

    def pieces(self) -> list[bytes]:
        """As :class:`Tokenizer` has it; an added token gives its spelling."""
        table = [b""] * self.padded_vocab_size
        for text, row in self._ordinary.items():
            table[row] = bytes(map(_BYTE_OF.__getitem__, text))
        for text, row in self.special_tokens.items():
            table[row] = text.encode()
        return table


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"no readable tokenizer: {error}", source=str(path), remedy="name a directory with a tokenizer.json"
        ) from error
    parts = [content.get("pre_tokenizer") or {}, content.get("decoder") or {}]
    kinds = {entry.get("type") for part in parts for entry in (part, *part.get("pretokenizers", []))}
    model = content.get("model") or {}
    added = {entry["content"] for entry in content.get("added_tokens", [])}
    ordinary = set(model.get("vocab", {})) - added
    spelled_in_bytes = all(symbol in _BYTE_OF for text in ordinary for symbol in text)
    if model.get("type") != "BPE" or "ByteLevel" not in kinds or not spelled_in_bytes:
        raise TokenizerError(
            "this is no byte-level BPE",
            source=str(path),
            remedy="name a tokenizer such as Qwen's or GPT-2's, whose every token is a sequence of bytes",
        )
    return {"added_tokens": [], **content}


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: GPT-2's table.

    Printable ones stand for themselves, the others for U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
