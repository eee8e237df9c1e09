"""A small distillation dataset in a compact vocabulary, and teachers of random weights that share it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_student import write_student
from vpmoe.cli import main

PADDED = 448


@pytest.fixture(scope="session")
def kd_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of synth_mini with both splits, in two shards of each."""
    folder = tmp_path_factory.mktemp("kd")
    rows, conversations, dataset = (str(folder / name) for name in ("rows", "conversations", "dataset"))
    assert main(["data", "synth-mini", "--output-dir", rows, "--rows", "60"]) == 0
    assert main(["data", "convert", "--input", rows, "--output-dir", conversations, "--num-shards", "2"]) == 0
    vocabulary = ["--compact-vocab-size", "400", "--padded-vocab-size", str(PADDED), "--valid-fraction", "0.2"]
    build = ["--input-dir", conversations, "--output-dir", dataset, "--seq-len", "192", "--workers", "1", "--quiet"]
    assert main(["data", "build", *build, *vocabulary]) == 0
    return folder / "dataset"


@pytest.fixture(scope="session")
def vocabulary_files(tmp_path_factory: pytest.TempPathFactory, kd_dataset: Path) -> list[Path]:
    """As a checkpoint of a model that was trained on the dataset keeps them."""
    from megatron_vpmoe.data.vocabulary_files import vocabulary_files
    from megatron_vpmoe.manifest import read_manifest

    folder, written = tmp_path_factory.mktemp("vocabulary"), []
    for name, content in vocabulary_files(read_manifest(kd_dataset)).items():
        (folder / name).write_bytes(content)
        written.append(folder / name)
    return written


@pytest.fixture(scope="session")
def nano_teacher(tmp_path_factory: pytest.TempPathFactory, vocabulary_files: list[Path]) -> Path:
    """A checkpoint of random weights with the dataset's vocabulary."""
    folder = tmp_path_factory.mktemp("teacher")
    return write_student(folder, assets=vocabulary_files, vocab_size=PADDED, padded_vocab_size=PADDED, num_layers=2)
