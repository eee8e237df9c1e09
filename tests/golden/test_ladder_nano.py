"""``make ladder-nano`` from end to end: its own files and commands, a smaller model and a few steps of training."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.manifest import read_manifest
from tests.distributed.test_training_jobs import toml
from tests.tiny import ROOT
from tests.workers import forked_commands
from vpmoe.ladder.climb import Request, climb, listing

pytestmark = pytest.mark.slow

LADDER = ROOT / "configs" / "nano" / "ladder.toml"
SMALL = {"hidden_size": 32, "kv_channels": 8}
DENSE = {**SMALL, "ffn_hidden_size": 32, "num_layers": 4}
GEOMETRY = {
    "qwen3": {**SMALL, "ffn_hidden_size": 96, "num_layers": 4},
    "donor": {**SMALL, "ffn_hidden_size": 96, "num_layers": 1},
    "vpdense0_5": DENSE,
    "vpdense_8": DENSE,
    "vpdense_16": {**DENSE, "num_layers": 8},
    "vpmoe": {**DENSE, "num_layers": 8, "moe_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 32},
}
TRAINING = {"train_iters": 4, "lr_warmup_iters": 1, "nproc_per_node": 1, "eval_iters": 1, "log_interval": 1}
TAUGHT = {
    "data_path": "data/ladder_nano/talk",
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "sample_interval": "null",
}
SAMPLED = {"rollout_groups": 4, "rollout_max_new_tokens": 24, "collapse": "warn", "collapse_length": "null"}
STAGES = ["vpmoe-stage2", "vpmoe-stage3"]
RUNGS = ["qwen3", "qwen3_o200k", "vpdense0_5", "vpdense_8", "vpdense_16", "vpmoe", *STAGES]
MADE = ["qwen3_trained", "donor_trained", *RUNGS]
INSTEAD = {"vpmoe-stage1": "vpmoe", "teacher": "donor_trained"}


def geometry_of(identifier: str) -> Mapping[str, Any]:
    name = max((name for name in GEOMETRY if identifier.startswith(name)), key=len)
    return GEOMETRY[name]


def in_folder(value: Any, folder: Path) -> Any:
    """Paths of what is made, moved into ``folder``; paths of the checkout made absolute."""
    if isinstance(value, dict):
        return {key: in_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [in_folder(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    for made in ("artifacts/ladder_nano", "data/ladder_nano", "reports/ladder"):
        value = value.replace(made, str(folder / made))
    return str(ROOT / value) if value.startswith("configs/") else value


def write_ladder(folder: Path) -> Path:
    """The nano ladder's own file with another place, geometry and length; returns its copy."""
    ladder = in_folder(tomllib.loads(LADDER.read_text()), folder)
    fewer = {"--rows 60000": "--rows 400", "--rows 8000": "--rows 200"}
    for many, few in fewer.items():
        ladder["prepare"] = [line.replace(many, few) for line in ladder["prepare"]]
    ladder["evaluation"] |= {"documents": 20, "per_family": 3, "conversation_tokens": 8}
    ladder["evaluation"]["suites"][0]["items"] = 20
    # No healings, no stage 1, and the donor as teacher: each training takes seconds to start.
    objects = {name: entry for name, entry in ladder.pop("objects").items() if name in MADE}
    for identifier, entry in objects.items():
        inputs = entry.get("inputs", {})
        entry["inputs"] = {
            role: name if name in MADE else INSTEAD.get(name, name.removesuffix("-healed"))
            for role, name in inputs.items()
        }
        if "config" in entry:
            entry["overrides"] = dict(geometry_of(identifier))
        settings = entry.setdefault("settings", {})
        if entry["job"] in ("pretrain", "heal"):
            data = "texts_bpe" if identifier == "qwen3_trained" else "texts_o200k"
            settings["overrides"] = {**TRAINING, "data_path": str(folder / "data" / "ladder_nano" / data)}
            if identifier in STAGES:
                settings["overrides"] |= in_folder(TAUGHT, folder) | (SAMPLED if identifier == STAGES[1] else {})
        if entry["job"] in ("shape", "morph"):
            settings |= {"calibration_tokens": 2000, "heldout_tokens": 200}
            settings |= {"steps": 2} if entry["job"] == "shape" else {}
        if entry["job"] == "vocabulary":
            settings |= {"k": 4, "largest_norm_ratio": 1e3}
    lines = [f"{key} = {toml(value)}" for key, value in ladder.items()]
    for name, entry in objects.items():
        lines += [f"[objects.{json.dumps(name)}]", *(f"{key} = {toml(value)}" for key, value in entry.items())]
    path = folder / "ladder.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rungs_and_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rung is made and evaluated; a second climb would find everything done."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    request = Request(write_ladder(tmp_path), quiet=True)
    with forked_commands():
        report = climb(request, lambda line: None)
    reports = tmp_path / "reports" / "ladder"
    assert report == json.loads((reports / "ladder.json").read_text())

    assert [step["object"] for step in report["steps"]] == RUNGS
    assert [entry["object"] for entry in report["below"]] == MADE[:2]
    by_name = {step["object"]: step for step in report["steps"]}
    for below, above in (("vpdense_8", "vpdense_16"), ("vpdense_16", "vpmoe")):
        before, after = (by_name[name]["evaluation"]["texts"]["nats_per_token"] for name in (below, above))
        assert after == pytest.approx(before, abs=1e-4), f"{above} keeps the function"
    assert all(step["evaluation"]["questions"]["n"] == 9 for step in report["steps"])
    for name, asked in (("vpmoe", None), *((stage, 9) for stage in STAGES)):
        conversations = by_name[name]["evaluation"]["conversations"]
        assert (conversations and conversations["n"]) == asked
    assert set(by_name["vpmoe-stage2"]["validation"]["valid/kd/analysis"]) == {"before", "after"}
    assert set(by_name["vpmoe-stage3"]["validation"]["valid/reward/exact"]) == {"before", "after"}
    assert [by_name[name]["training"]["objective"] for name in STAGES] == ["topk_kd", "on_policy"]
    told = {
        name: json.loads((tmp_path / "artifacts" / "ladder_nano" / name / "receipt.json").read_text())["report"]
        for name in STAGES
    }
    assert told["vpmoe-stage2"]["conversion"]["scored"]["coverage"] == 1
    assert told["vpmoe-stage3"]["inputs"]["teacher"]["object"] == "donor_trained"
    # The anchor of stage 3 reads on in the conversations behind stage 2, which read them with the teacher's records.
    talk = read_manifest(tmp_path / "data" / "ladder_nano" / "talk").sha256
    read = [told[name]["rows_read"][talk] for name in STAGES]
    assert read[0] == TRAINING["train_iters"] * TAUGHT["global_batch_size"] < read[1]
    health = told["vpmoe-stage2"]["conversion"]["router_health"]["first_steps"]
    assert health["steps"] == [1, 2, 3, 4]
    assert {"moe/router_agg/mean_entropy", "moe/router_agg/max_vio", "moe/router_agg/dead_experts_count"} <= set(health)
    table = (reports / "ladder.md").read_text()
    assert all(f"`{name}`" in table for name in RUNGS) and (reports / "ladder.png").is_file()
    assert all(step["suites"]["text"]["number"] == "bits_per_byte" for step in report["steps"])
    assert (reports / "eval" / "text" / "vpmoe-stage3" / "vpmoe-stage3.items.jsonl").is_file()

    lines = listing(request)
    assert len(lines) == len(MADE) and all("done and up to date" in line for line in lines)
