"""The full vocabulary, loaded once."""

import pytest

from vpmoe.tokenizer.o200k_harmony import O200kHarmony, load_o200k_harmony


@pytest.fixture(scope="session")
def full() -> O200kHarmony:
    return load_o200k_harmony()
