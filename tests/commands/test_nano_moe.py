"""``vpmoe nano-moe`` as a user gives it, at a toy size: every stage for real, and the second time nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vpmoe.files import sha256_of_file
from tests.unit.vpmoe.test_provenance_blocks import whole
from tests.workers import forked_commands
from vpmoe.cli import main

pytestmark = pytest.mark.slow

TOY = """
num_layers = 2
hidden_size = 32
num_attention_heads = 4
kv_channels = 8
padded_vocab_size = 2000
moe_ffn_hidden_size = 32
moe_shared_expert_intermediate_size = 32
nproc_per_node = 1
train_iters = 4
lr_warmup_iters = 1
eval_interval = 2
eval_iters = 1
"""
STAGES = ("pretrain", "sft", "dpo")
SETTINGS = """
[stories]
rows = 400
[tokenizer]
special_tokens = "harmony"
[prompts]
rows = 200
seed = 2
test_fraction = 0.1
[pairs]
rows = 100
seed = 3
valid_fraction = 0.1
[evaluation]
limit = 5
max_new_tokens = 12
[figures]
prompts = 2
max_new_tokens = 4
[targets]
perplexity = 6.0
required_words = 0.6
required_words_gain = 0.3
protagonist_gain = 0.1
banned_words = 0.05
"""


def test_every_stage_then_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = "".join(
        f'[{stage}]\nconfig = "configs/nano_moe/{stage}.yaml"\n[{stage}.overrides]{TOY}' for stage in STAGES
    )
    (tmp_path / "toy.toml").write_text(SETTINGS + stages)
    words = ["nano-moe", "--settings", str(tmp_path / "toy.toml"), "--work-dir", str(tmp_path), "--seed", "1"]
    folder = tmp_path / "reports" / "nano_moe"
    folder.mkdir(parents=True)
    (folder / "report.md").write_text("mine")
    assert main(words) == 2 and not (tmp_path / "data").exists()  # said before hours of work, not after
    assert "NotOursError" in capfd.readouterr().err
    (folder / "report.md").unlink()
    with forked_commands():
        assert main(words) == 0  # what it measures binds nobody at this size
    assert "do not bind with --settings" in capfd.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert whole(report["provenance"]) and set(report["provenance"]["config_hash"]) == set(STAGES)
    assert report["parameters"] > report["active_parameters"] > 0 and report["perplexity"] > 6
    assert report["required_words"].keys() == report["protagonist"].keys() == {"pretrained", "sft", "dpo"}
    (seed,) = report["seeds"]
    assert seed["tokens"]["pretrained"] > 4 * 4 * 200  # of every step, though few are recorded
    assert not report["targets"]["met"]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG") and "| 1 | dpo |" in (
        folder / "report.md"
    ).read_text()
    figures = folder / "figs_1"
    asked = json.loads((figures / "figures.json").read_text())["prompts"]
    assert sha256_of_file(figures / asked["name"]) == asked["sha256"] and asked["count"] == 2
    drawn = json.loads((figures / "figures.json").read_text())["runs"]
    assert {name: one["over_prompts"]["form"] for name, one in drawn.items()} == {
        "nano_moe_pretrain_1": "passage",
        "nano_moe_sft_1": "conversation",
        "nano_moe_dpo_1": "conversation",
    }
    checkpoints = sorted((tmp_path / "runs").rglob("files.json"))
    before = {path: path.stat().st_mtime_ns for path in checkpoints}
    assert len(before) >= len(STAGES)
    with forked_commands():
        assert main(words) == 0
    said = "".join(capfd.readouterr())
    assert said.count(": done and valid") == 7 + 3 + 4 + 1  # data, trainings, evaluations, plots
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == before
    assert json.loads((folder / "report.json").read_text())["seeds"] == report["seeds"]
