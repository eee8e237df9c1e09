"""The three kinds of vocabulary that conversations are rendered with."""

import numpy as np
import pytest

from tests.learned_vocabulary import write_vocabulary
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.hf_directory import HFDirectory
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


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> HFDirectory:
    return HFDirectory(write_vocabulary(tmp_path_factory.mktemp("learned")))


@pytest.fixture(params=["full", "compact", "learned"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
