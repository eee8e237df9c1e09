"""A small dataset of generated rows: conversations and token files, built once."""

from pathlib import Path

import pytest
from conftest_dataset import OPTIONS, ROWS

from vpmoe.data_curation.conversations import store as conversation_shards
from vpmoe.data_curation.conversations.convert import convert
from vpmoe.data_curation.conversations.synth import resolve_synth
from vpmoe.data_curation.datasets.kd import build
from vpmoe.data_curation.tasks import synth_mini
from vpmoe.harmony.prompts import Prompts


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated rows with their test questions."""
    folder = tmp_path_factory.mktemp("rows")
    synth_mini.generate(folder, rows=ROWS, seed=7, families=synth_mini.parse_mix(synth_mini.DEFAULT_MIX))
    return folder


@pytest.fixture(scope="session")
def conversations_dir(rows_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as conversations in 5 shards of several row groups."""
    folder = tmp_path_factory.mktemp("conversations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversation_shards, "ROW_GROUP_ROWS", 32)
        convert(resolve_synth(str(rows_dir)), folder, num_shards=5, prompts=Prompts(developer_instructions=None))
    return folder


@pytest.fixture(scope="session")
def dataset_dir(conversations_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversations as token files with a compact vocabulary."""
    folder = tmp_path_factory.mktemp("dataset")
    build(conversations_dir, folder, OPTIONS, quiet=True)
    return folder
