"""Both vocabularies and the strategies for conversations."""

import numpy as np
import pytest

from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.interface import Tokenizer
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, O200kHarmony, load_o200k_harmony


@pytest.fixture(scope="session")
def full() -> O200kHarmony:
    return load_o200k_harmony()


@pytest.fixture(scope="session")
def compact(full: O200kHarmony) -> CompactVocabulary:
    text = "What is 37 + 45? system developer user assistant analysis final Reasoning"
    counts = np.bincount(full.encode_ordinary(text), minlength=VOCAB_SIZE)
    return CompactVocabulary.from_counts(full, counts)


@pytest.fixture(params=["full", "compact"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
