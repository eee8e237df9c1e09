"""What goes with the weights into every later checkpoint: messages from the dataset, and the one vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.errors import CheckpointError, DataError
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
    from megatron_vpmoe.training.carried import carried_by
    from megatron_vpmoe.training.checkpoint import Carried, Found

    before = None
    if stored is not None:
        before = Found(tmp_path, {"iteration": 0, "prompts": stored})
        assert Carried.of(before).state == {"prompts": stored}
    manifests = [read_manifest(dataset(tmp_path / str(number), prompts)) for number, prompts in enumerate(taught)]
    cfg = tiny_config(data_path=manifests[0].root)
    assert carried_by(before, manifests, cfg).state.get("prompts") == expected


def test_a_manifest_without_messages_and_one_of_another_shape(tmp_path: Path) -> None:
    assert read_manifest(small_dataset(tmp_path / "old")).prompts is None
    assert read_manifest(dataset(tmp_path / "new", OURS)).prompts == PromptsEntry(system="You are.")
    with pytest.raises(DataError, match="prompts"):
        read_manifest(dataset(tmp_path / "wrong", ["You are."]))


def test_weights_in_another_vocabulary_are_refused_whatever_files_tell_it(tmp_path: Path) -> None:
    from megatron_vpmoe.training.carried import carried_by
    from megatron_vpmoe.training.checkpoint import Found

    manifest = read_manifest(small_dataset(tmp_path / "data"))
    (tmp_path / "weights" / "assets").mkdir(parents=True)
    (tmp_path / "weights" / "assets" / "tokenizer.json").write_bytes(b"{}")
    weights, cfg = Found(tmp_path / "weights", {"iteration": 0}), tiny_config(data_path=manifest.root)
    with pytest.raises(CheckpointError, match="vocabulary: name hf_tokenizer and o200k"):
        carried_by(weights, [manifest], cfg)
    cfg = tiny_config(data_path=manifest.root, allow_provenance_change=True)
    assert carried_by(weights, [manifest], cfg).assets.keys() == {"vocabulary.json"}


@pytest.mark.parametrize("of_pairs", [False, True])
def test_an_objective_refuses_datasets_of_a_kind_that_it_does_not_read(of_pairs: bool, tmp_path: Path) -> None:
    from megatron_vpmoe.objectives import Needs, TokenCE, check_kinds

    class Preferring(TokenCE):
        needs = Needs(pairs=True)

    cfg = tiny_config()
    kinds = ["harmony_kd", "healing_text", "harmony_sft", "harmony_preference"]
    for kind in kinds:
        root = small_dataset(tmp_path / kind)
        rewrite_manifest(root, lambda manifest, kind=kind: manifest.update(kind=kind, pairs=kind == kinds[-1]))
        manifests = [read_manifest(root)]
        if of_pairs == (kind == "harmony_preference"):
            check_kinds(Preferring() if of_pairs else TokenCE(), cfg, manifests)
        else:
            with pytest.raises(DataError, match=f"of kind {kind}"):
                check_kinds(Preferring() if of_pairs else TokenCE(), cfg, manifests)
