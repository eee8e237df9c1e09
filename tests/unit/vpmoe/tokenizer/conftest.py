"""The full vocabulary, loaded once."""

import pytest
from hypothesis import settings

from vpmoe.tokenizer.o200k_harmony import O200kHarmony, load_o200k_harmony

# The first example pays for loading the vocabulary: time per example says nothing.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def full() -> O200kHarmony:
    return load_o200k_harmony()
