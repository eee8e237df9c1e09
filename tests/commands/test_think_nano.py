"""``vpmoe think-nano`` as a user gives it, at a toy size: every stage for real, and the second time nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.vpmoe.test_provenance_blocks import whole
from tests.workers import forked_commands
from vpmoe.cli import main

pytestmark = pytest.mark.slow

STAGES = ("transformer", "state_space", "diffuser", "mixture")
TOY = """
nproc_per_node = 1
micro_batch_size = 2
global_batch_size = 2
train_iters = 4
lr_warmup_iters = 1
eval_interval = 2
eval_iters = 1
"""
SETTINGS = """
memory_entries = 2
[store]
chunk = 16
[rows]
rows = 200
[dataset]
valid_fraction = 0.1
[domains.symbols]
sorting = 1.0
[domains.lookup]
lookup = 1.0
"""


def test_every_phase_then_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = "".join(
        f'[{stage}]\nconfig = "configs/think/nano/{stage}.yaml"\n[{stage}.overrides]{TOY}' for stage in STAGES
    )
    (tmp_path / "toy.toml").write_text(SETTINGS + stages)
    words = ["think-nano", "--settings", str(tmp_path / "toy.toml"), "--work-dir", str(tmp_path), "--seed", "1"]
    with forked_commands():
        assert main(words) == 0
    folder = tmp_path / "reports" / "think_nano"
    report = json.loads((folder / "report.json").read_text())
    assert whole(report["provenance"]) and report["provenance"]["tokenizer"]
    assert len(report["provenance"]["dataset_manifest_sha256"]["full"]) == 2
    assert 2 < report["full"]["nats"] < 7 and report["routing"].keys() == {"symbols", "lookup"}
    assert report["store"] == {"with": report["full"]["nats"], "without": report["storeless"]["nats"]}
    for name in ("transformer", "state_space"):
        alone = report["experts"][name]
        assert 2 < alone["nats"] < 7 and alone["tokens"] == report["full"]["tokens"] > 8 * 384
    for weights in report["routing"].values():
        assert sum(weights[kind] for kind in ("transformer", "state_space", "denoiser")) == pytest.approx(1, abs=1e-4)
        assert all(0 < std < 0.5 for std in weights["std"].values()) and len(weights["std"]) == 3
    assert report["said"] and "| 1 | full model |" in (folder / "report.md").read_text()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    checkpoints = sorted((tmp_path / "runs").rglob("files.json"))
    before = {path: path.stat().st_mtime_ns for path in checkpoints}
    assert len(before) >= 7
    capfd.readouterr()
    with forked_commands():
        assert main(words) == 0
    assert "".join(capfd.readouterr()).count(": done and valid") == 3 * 3 + 7 + 1  # data, trainings, store
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == before
