"""System and developer messages go with the weights, from the dataset that taught them to every later checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import PromptsEntry, read_manifest
from tests.fixtures_dataset import rewrite_manifest, small_dataset
from tests.tiny import tiny_config

OURS = {"system": "You are.", "developer": None}


def dataset(folder: Path, prompts: Any) -> Path:
    root = small_dataset(folder)
    rewrite_manifest(root, lambda manifest: manifest.update(prompts=prompts))
    return root


@pytest.mark.parametrize(
    ("stored", "taught", "expected"),
    [
        (None, [OURS], OURS),
        (None, [None, OURS], OURS),
        (OURS, [None], OURS),
        (OURS, [{"system": "You were."}], {"system": "You were.", "developer": None}),
        (None, [None], None),
    ],
)
def test_whose_messages_a_checkpoint_keeps(stored: Any, taught: list[Any], expected: Any, tmp_path: Path) -> None:
    from megatron_vpmoe.training.checkpoint import Carried, Found
    from megatron_vpmoe.training.run import _carried

    before = None
    if stored is not None:
        before = Found(tmp_path, {"iteration": 0, "prompts": stored})
        assert Carried.of(before).state == {"prompts": stored}
    manifests = [read_manifest(dataset(tmp_path / str(number), prompts)) for number, prompts in enumerate(taught)]
    cfg = tiny_config(data_path=manifests[0].root)
    assert _carried(before, manifests, cfg).state.get("prompts") == expected


def test_a_manifest_without_messages_and_one_of_another_shape(tmp_path: Path) -> None:
    assert read_manifest(small_dataset(tmp_path / "old")).prompts is None
    assert read_manifest(dataset(tmp_path / "new", OURS)).prompts == PromptsEntry(system="You are.")
    with pytest.raises(DataError, match="prompts"):
        read_manifest(dataset(tmp_path / "wrong", ["You are."]))
