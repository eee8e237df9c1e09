"""A vocabulary of bytes and special tokens, and generations written by hand in it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from vpmoe.harmony.parse import Parser
from vpmoe.tokenizer import CompactVocabulary, O200kHarmony, Tokenizer
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE

GOOD = "<|channel|>analysis<|message|>7 + 8 = 15<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"


@pytest.fixture(scope="session")
def tokenizer() -> CompactVocabulary:
    return CompactVocabulary.from_counts(O200kHarmony(), np.zeros(VOCAB_SIZE, dtype=np.int64), padded_vocab_size=320)


@pytest.fixture(scope="session")
def parser(tokenizer: CompactVocabulary) -> Parser:
    return Parser(tokenizer)


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text in which special tokens are spelled out."""
    found: list[int] = []
    for part in re.split(r"(<\|\w+\|>)", text):
        special = part in tokenizer.special_tokens
        found += [tokenizer.special_tokens[part]] if special else tokenizer.encode_ordinary(part).tolist()
    return found


@pytest.fixture(scope="session")
def ids(tokenizer: CompactVocabulary) -> Callable[[str], list[int]]:
    return lambda text: ids_of(text, tokenizer)
