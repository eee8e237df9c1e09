"""Provenance: what binds a checkpoint to its run, and what is only told."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import pytest

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.software import git_state
from megatron_vpmoe.training.provenance import check_provenance, collect_provenance, compare
from tests.fixtures_dataset import rewrite_manifest, small_dataset
from tests.tiny import tiny_config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small_dataset(tmp_path / "set")


def state_of(cfg, root: Path) -> dict:
    """As a checkpoint stores it: through JSON."""
    provenance = collect_provenance(cfg, [read_manifest(root)])
    return json.loads(json.dumps({"config": cfg.model_dump(mode="json"), "provenance": provenance}))


def test_the_same_run_continues_without_a_word(root: Path):
    cfg = tiny_config(data_path=root)
    assert check_provenance(state_of(cfg, root), cfg, source="checkpoint") == []


def test_operational_fields_are_free(root: Path):
    state = state_of(tiny_config(data_path=root), root)
    changed = tiny_config(data_path=root, lr=0.5, log_interval=3, micro_batch_size=1, run_name="other", train_iters=99)
    assert check_provenance(state, changed, source="checkpoint") == []


def test_model_and_order_bind_and_every_difference_is_listed(root: Path):
    state = state_of(tiny_config(data_path=root), root)
    changed = tiny_config(data_path=root, num_layers=8, data_seed=99)
    with pytest.raises(CheckpointError) as caught:
        check_provenance(state, changed, source="runs/x/checkpoints/7")
    text = str(caught.value)
    assert "model.num_layers: 4 -> 8" in text and "data.data_seed: 1234 -> 99" in text
    assert "runs/x/checkpoints/7" in text


def test_other_prompts_bind_but_another_place_does_not(root: Path, tmp_path: Path):
    prompts = {name: tmp_path / name for name in ("first", "moved", "other")}
    for name, path in prompts.items():
        path.write_text("[9]" if name == "other" else "[5]")
    fields = {
        "data_path": root,
        "objective": "grpo",
        "rewards": [{"function": "finished"}],
        "eval_interval": None,
        "seq_length": 512,
    }
    first, moved, other = (tiny_config(**fields, rollout_prompts=path) for path in prompts.values())
    state = state_of(first, root)
    assert check_provenance(state, moved, source="c") == []
    with pytest.raises(CheckpointError, match="rollout_prompts_sha256"):
        check_provenance(state, other, source="c")


def test_another_dataset_binds_but_another_place_does_not(root: Path, tmp_path: Path):
    state = state_of(tiny_config(data_path=root), root)
    moved = tmp_path / "moved"
    root.rename(moved)
    cfg = tiny_config(data_path=moved)
    assert check_provenance(state, cfg, source="c") == []
    rewrite_manifest(moved, lambda m: m.update(git={"sha": "another commit"}))
    assert check_provenance(state, cfg, source="c") == []
    rewrite_manifest(moved, lambda m: m.update(prompts={"system": "another"}))
    with pytest.raises(CheckpointError, match="dataset_manifest_sha256"):
        check_provenance(state, cfg, source="c")


def test_another_vocabulary_binds(root: Path):
    cfg = tiny_config(data_path=root)
    state = state_of(cfg, root)
    rewrite_manifest(root, lambda m: m["tokenizer"].update(rank_file_sha256="1" * 64))
    with pytest.raises(CheckpointError, match=r"tokenizer\.rank_file_sha256"):
        check_provenance(state, cfg, source="c")


def test_code_packages_and_hardware_are_told_but_free(root: Path):
    cfg = tiny_config(data_path=root)
    state = state_of(cfg, root)
    state["provenance"]["git"] = {"sha": "abc", "dirty": True}
    state["provenance"]["packages"]["torch"] = "1.0"
    state["provenance"]["hardware"]["cpu"] = "Analytical Engine"
    notes = "\n".join(check_provenance(state, cfg, source="c"))
    assert "packages.torch: '1.0' -> " in notes and "git.sha: 'abc' -> " in notes
    assert "hardware.cpu: 'Analytical Engine' -> " in notes


def test_what_binds_and_what_is_free(root: Path):
    old = state_of(tiny_config(data_path=root), root)
    new = copy.deepcopy(old)
    new["provenance"]["packages"]["torch"] = "1.0"
    new["provenance"]["dataset_manifest_sha256"] = "other"
    new["config"]["moe"]["num_experts"] = 4
    binding, free = compare(old, new)
    assert [change.key for change in binding] == ["moe.num_experts", "dataset_manifest_sha256"]
    assert [change.key for change in free] == ["packages.torch"]


def test_git_state(tmp_path: Path):
    assert git_state(tmp_path) == {"sha": None, "dirty": None}

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) == {"sha": None, "dirty": None}
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert len(str(clean["sha"])) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"sha": clean["sha"], "dirty": True}
