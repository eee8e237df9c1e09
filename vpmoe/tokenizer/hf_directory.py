"""A vocabulary that lies in an HF directory as ``tokenizer.json``: a byte-level BPE, as Qwen's is.

Conversations can be rendered with it where Harmony's tokens are among its added ones, as in one that
``vpmoe tokenizer train --special-tokens harmony`` made.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megatron_vpmoe.files import read_json, sha256_of_file
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
# What would read special tokens out of a text, or cut and fill it.
_BARE: dict[str, Any] = {"added_tokens": [], "truncation": None, "padding": None}


class HFDirectory(Tokenizer):
    """The tokenizer of an HF directory.

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
        content, _ = read_tokenizer(folder)
        self.rank_file_sha256 = sha256_of_file(path)
        if sha256 is not None and self.rank_file_sha256 != sha256:
            raise TokenizerError(
                f"the tokenizer's sha256 is {self.rank_file_sha256}, the manifest says {sha256}",
                source=str(path),
                remedy="restore the file that the dataset was built with, or build the dataset again",
            )
        self.special_tokens: dict[str, int] = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        if fault := _byte_level_fault(content, self.special_tokens):
            raise TokenizerError(
                fault,
                source=str(path),
                remedy="name a tokenizer such as Qwen's or GPT-2's, whose every token is a sequence of bytes",
            )
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
        self._encoding = tokenizers.Tokenizer.from_str(json.dumps({**content, **_BARE}))

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


def read_tokenizer(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """``tokenizer.json`` of any kind of vocabulary: its content (with ``added_tokens``), and every token's id.

    Raises:
        TokenizerError: there is none; the tokenizers library cannot read it, or reads other ids out of it than it says;
            or it draws how it cuts a text (``dropout``).
    """
    path, remedy = folder / FILE_NAME, "put the tokenizer.json there that the model was trained with"
    content = {"added_tokens": [], **read_json(path, error=TokenizerError, remedy=remedy)}
    try:
        ids = tokenizers.Tokenizer.from_str(json.dumps(content)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library has no narrower one
        raise TokenizerError(f"no readable tokenizer: {error}", source=str(path), remedy=remedy) from error
    told = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    faults = [
        f"{text!r} has id {row}, and is read as {ids.get(text)}" for text, row in told.items() if ids.get(text) != row
    ]
    if content["model"].get("dropout"):
        faults.append("a dropout, with which the same text has other ids each time")
    if faults:
        raise TokenizerError(f"no tokenizer to rely on: {faults[0]}", source=str(path), remedy=remedy)
    return content, ids


def _byte_level_fault(content: dict[str, Any], added: Collection[str]) -> str | None:
    model, parts = content["model"], [content.get("pre_tokenizer") or {}, content.get("decoder") or {}]
    kinds = {entry["type"] for part in parts for entry in (part, *part.get("pretokenizers", [])) if entry}
    if model.get("type") != "BPE" or "ByteLevel" not in kinds:
        return "this is no byte-level BPE"
    ordinary = model["vocab"].keys() - added
    if not all(symbol in _BYTE_OF for text in ordinary for symbol in text):
        return "this is no byte-level BPE: a token has characters that stand for no byte"
    missing = [byte for symbol, byte in _BYTE_OF.items() if symbol not in ordinary]
    return f"no token for byte 0x{missing[0]:02x}, which a text would lose" if missing else None


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
