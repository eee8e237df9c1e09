"""The o200k Harmony vocabulary: 199,998 ordinary ranks of o200k_base and Harmony's special tokens up to id 201,087."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

from vpmoe.errors import TokenizerError
from vpmoe.tokenizer import rank_file
from vpmoe.tokenizer.interface import TokenArray, Tokenizer, no_utf8_form

NAME = "o200k_harmony"
VOCAB_SIZE = 201_088
FIRST_SPECIAL_ID = rank_file.RANK_COUNT
NAMED_SPECIAL_TOKENS = {
    "<|startoftext|>": 199_998,
    "<|endoftext|>": 199_999,
    "<|return|>": 200_002,
    "<|constrain|>": 200_003,
    "<|channel|>": 200_005,
    "<|start|>": 200_006,
    "<|end|>": 200_007,
    "<|message|>": 200_008,
    "<|call|>": 200_012,
}
ALL_SPECIAL_TOKENS = NAMED_SPECIAL_TOKENS | {
    f"<|reserved_{token_id}|>": token_id
    for token_id in range(FIRST_SPECIAL_ID, VOCAB_SIZE)
    if token_id not in NAMED_SPECIAL_TOKENS.values()
}

_NO_SPECIAL: frozenset[str] = frozenset()
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# How o200k cuts text before merging; the merges are only right on exactly these cuts.
SPLIT_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTION,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTION,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# Without its one lookahead the pattern compiles to an automaton, a fifth faster than backtracking. The two patterns
# differ at one place only: where two or more blanks stand before a word, `\s+(?!\S)` leaves the last blank to the word.
# Cutting the text in front of that blank gives the same pieces.
_PATTERN_WITHOUT_LOOKAHEAD = SPLIT_PATTERN.replace(r"|\s+(?!\S)", "")
# White space of Unicode but for space, carriage return and line feed.
_ODD_ASCII_BLANKS = "\t\v\f"
_GENERAL_PUNCTUATION_BLANKS = "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f"
_ODD_BLANKS = _ODD_ASCII_BLANKS + "\x85\xa0\u1680" + _GENERAL_PUNCTUATION_BLANKS + "\u3000"
_BLANKS = f" {_ODD_BLANKS}"
_TWO_BLANKS = re.compile(f"[{_BLANKS}]{{2}}(?=[^\r\n{_BLANKS}])")


class O200kHarmony(Tokenizer):
    """The full vocabulary of 201,088 ids.

    Args:
        path: a rank file or the folder of one; None searches as :func:`vpmoe.tokenizer.rank_file.find` does.

    Raises:
        TokenizerError: no rank file, or one with a wrong hash.
    """

    name = NAME
    rank_file_sha256 = rank_file.SHA256
    vocab_size = VOCAB_SIZE
    padded_vocab_size = VOCAB_SIZE
    eod_id = NAMED_SPECIAL_TOKENS["<|endoftext|>"]
    first_special_id = FIRST_SPECIAL_ID
    special_tokens = NAMED_SPECIAL_TOKENS

    def __init__(self, path: Path | None = None) -> None:
        found = rank_file.find(path)
        self.source = found.source
        self.rank_file_path = path
        self.ranks = found.ranks()
        # One special token only, and that one is never allowed: the numpy route of tiktoken searches the text for
        # every special token it knows, and a thousand of them cost a quarter of the speed.
        self._encoding = tiktoken.Encoding(
            NAME,
            pat_str=_PATTERN_WITHOUT_LOOKAHEAD,
            mergeable_ranks=self.ranks,
            special_tokens={"<|endoftext|>": self.eod_id},
        )
        # What encode_to_numpy of tiktoken calls, without its checks for special tokens that do not apply here.
        self._encode_to_buffer = self._encoding._core_bpe.encode_to_tiktoken_buffer

    def rank_file_content(self) -> bytes:
        """The rank file, unpacked."""
        return rank_file.find(self.rank_file_path).content

    def special_id(self, spelling: str) -> int:
        """Id of a named or reserved (``<|reserved_N|>``) special token."""
        return ALL_SPECIAL_TOKENS[spelling] if spelling in ALL_SPECIAL_TOKENS else super().special_id(spelling)

    def encode_ordinary(self, text: str) -> TokenArray:
        """Ids of ``text`` as ordinary text, int32 ``[n]``; raises :class:`TokenizerError` for text that has none."""
        try:
            if cuts := _cuts(text):
                bounds = pairwise((0, *cuts, len(text)))
                return np.concatenate([self._encode_uncut(text[begin:end]) for begin, end in bounds])
            return self._encode_uncut(text)
        except UnicodeEncodeError as error:
            raise no_utf8_form(text, error) from error
        except ValueError as error:
            # The split pattern backtracks; about a million blanks in a row exhaust the stack that it is given.
            raise TokenizerError(
                f"text of {len(text)} characters cannot be split: {error}",
                source=repr(text[:40]),
                remedy="reject the row, or shorten its runs of white space",
            ) from error

    def _encode_uncut(self, text: str) -> TokenArray:
        return np.frombuffer(self._encode_to_buffer(text, _NO_SPECIAL), dtype=np.int32)

    def from_o200k(self, ids: Sequence[int] | TokenArray) -> TokenArray:
        """The ids themselves, as int32."""
        return np.asarray(ids, dtype=np.int32)

    def pieces(self) -> list[bytes]:
        """Bytes of all 201,088 ids in order; a special token's piece is its spelling."""
        table = [b""] * VOCAB_SIZE
        for piece, token_id in self.ranks.items():
            table[token_id] = piece
        for spelling, token_id in ALL_SPECIAL_TOKENS.items():
            table[token_id] = spelling.encode()
        return table


def _cuts(text: str) -> list[int]:
    """Places before the last of several blanks in front of a word."""
    for blank in _ODD_ASCII_BLANKS if text.isascii() else _ODD_BLANKS:
        if blank in text:
            return [found.end() - 1 for found in _TWO_BLANKS.finditer(text)]
    cuts: list[int] = []
    # Spaces alone, as almost always: searching by hand is several times faster than the expression.
    begin = text.find("  ")
    while begin >= 0:
        end = begin + 2
        while text.startswith(" ", end):
            end += 1
        if end < len(text) and text[end] not in "\r\n":
            cuts.append(end - 1)
        begin = text.find("  ", end)
    return cuts


def load_o200k_harmony(path: Path | None = None) -> O200kHarmony:
    """One :class:`O200kHarmony` a process: it takes a third of a second and 150 MB."""
    return _load(path)


_load = lru_cache(maxsize=1)(O200kHarmony)
