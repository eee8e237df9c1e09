"""``pretrain`` and ``heal`` as a user runs them: real training processes, one killed half-way, and their receipts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.config import load_config
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import read_manifest
from tests import training_runs
from tests.fixtures_dataset import rewrite_manifest
from tests.golden.test_vocabulary_travels import WORDS
from tests.golden.test_vocabulary_travels import dataset as text_dataset
from tests.tiny import ROOT
from tests.unit.vpmoe.test_provenance_blocks import whole
from tests.workers import forked_commands
from vpmoe.errors import NotOursError, UpcycleError
from vpmoe.runs.queries import last_values
from vpmoe.runs.registry import find_run
from vpmoe.upcycle import runner, training_jobs
from vpmoe.upcycle.ladder_file import Ladder, flags, read_ladder
from vpmoe.weights import megatron_checkpoint
from vpmoe.weights.tensors import tensor_sha256

pytestmark = pytest.mark.slow

GEOMETRY = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 8,
    "padded_vocab_size": 384,
}
STEPS = 12
RUN = {
    **GEOMETRY,
    "seq_length": 48,
    "objective": "token_ce",
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": STEPS,
    "lr_warmup_iters": 2,
    "nproc_per_node": 1,
    "wandb_mode": "disabled",
    "log_interval": 1,
    "eval_interval": 100,
    "sample_interval": "null",
    "save_interval": 3,
}
QWEN3 = f"{ROOT}/configs/nano/qwen3.yaml"
HEALING = {**RUN, "train_only": ["embedding.*", "*.mlp.*"]}
JOBS = {
    "random": ("pretrain", {"overrides": RUN}, {}),
    "imported": ("import_qwen3", {"prompt_lengths": [5], "greedy_steps": 4}, {"source": "random"}),
    "healed": ("heal", {"overrides": HEALING}, {"model": "imported"}),
    "healed_again": ("heal", {"overrides": HEALING}, {"model": "imported"}),
}


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def write_ladder(root: Path, dataset: Path, **changes: object) -> Ladder:
    (root / "shared.yaml").write_text("logging: {log_interval: 1}\n")
    lines = [f'folder = "{root}"']
    for name, (job, settings, inputs) in JOBS.items():
        if "overrides" in settings:
            settings = {
                "config": str(root / "shared.yaml"),
                "overrides": {**settings["overrides"], "data_path": str(dataset), **changes},
            }
        entry = {
            "rung": 0,
            "config": QWEN3,
            "overrides": GEOMETRY,
            "job": job,
            "settings": settings,
            "inputs": inputs,
        }
        lines += [f"[objects.{name}]", *(f"{key} = {toml(value)}" for key, value in entry.items())]
    (root / "ladder.toml").write_text("\n".join(lines))
    return read_ladder(root / "ladder.toml")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_dataset(tmp_path_factory.mktemp("data") / "text", " ".join(WORDS))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Ladder:
    """``random`` and ``imported`` are made."""
    ladder = write_ladder(tmp_path_factory.mktemp("ladder"), dataset)
    with forked_commands():
        for name in ("random", "imported"):
            runner.run(runner.plan(ladder, name), quiet=True)
    return ladder


def weights(ladder: Ladder, name: str) -> dict[str, str]:
    """Hashes of an object's tensors."""
    stored = megatron_checkpoint.read_weights(Path(ladder.get(name).path) / "megatron" / "iter_0000000")
    return {name: tensor_sha256(tensor.read()) for name, tensor in stored.items()}


def receipt(ladder: Ladder, name: str) -> dict[str, Any]:
    return json.loads((Path(ladder.get(name).path) / "receipt.json").read_text())


def report(ladder: Ladder, name: str) -> dict[str, Any]:
    """What the receipt of an object reports."""
    return receipt(ladder, name)["report"]


def test_pretrain_makes_an_object_of_a_training(ladder: Ladder) -> None:
    made = report(ladder, "random")
    assert made["inputs"] == {}
    loss = made["verification"]["validation"]["valid/loss/total"]
    assert loss["after"] < loss["before"]
    assert made["conversion"]["training"]["steps"] == made["conversion"]["training"]["logged_steps"] == STEPS
    files = receipt(ladder, "random")["files"]
    assert {
        "training/metrics.jsonl",
        "training/config.yaml",
        "hf/config.json",
        "hf/tokenizer_config.json",
    } <= files.keys()
    run = find_run(str(kept := Path(ladder.get("random").path) / "training"))
    assert os.path.samefile(run.directory, kept), "the run store finds it where it is kept"
    assert (run.name, run.status, run.experiment) == ("random", "finished", kept.parent.parent.name)
    assert last_values(run)["valid/loss/total"] == loss["after"]


def test_an_object_and_its_export_say_what_it_was_trained_on(ladder: Ladder, dataset: Path) -> None:
    folder = Path(ladder.get("random").path)
    trained = json.loads((folder / "hf" / "config.json").read_text())["provenance"]
    assert trained["dataset_manifest_sha256"] == read_manifest(dataset).sha256
    block = receipt(ladder, "random")["provenance"]
    for origin in (trained, block):
        assert whole(origin) and origin["config_hash"] == trained["config_hash"] is not None
        assert origin["tokenizer"] == read_manifest(dataset).tokenizer.identity()
    assert block["dataset_manifest_sha256"] == trained["dataset_manifest_sha256"]


def test_a_derived_object_serves_as_a_source(ladder: Ladder) -> None:
    random, imported = report(ladder, "random"), report(ladder, "imported")
    assert imported["inputs"]["source"]["object"] == "random"
    assert imported["weights_sha256"] == random["weights_sha256"]


def test_killed_in_the_middle_it_goes_on_to_the_same_weights(ladder: Ladder) -> None:
    with forked_commands():
        runner.run(runner.plan(ladder, "healed"), quiet=True)
    folder = Path(ladder.get("healed_again").path)
    run = folder.with_name("healed_again.partial") / "scratch" / "run"
    words = [sys.executable, "-m", "vpmoe.cli", "upcycle", "run", "healed_again", "--ladder", str(ladder.path)]
    environment = {**training_runs.ENVIRONMENT, "VPMOE_TEST_RUN": str(run)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not any(record["step"] >= 7 for record in training_runs.records(run)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while left := training_runs.processes_with_environment("VPMOE_TEST_RUN", str(run)):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert not folder.exists()
    assert list((run / "checkpoints").glob("iter_*")) and not (run / "checkpoints" / f"iter_{STEPS:07d}").exists()

    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "continues" in done.stderr and "loss" in done.stderr
    json.loads(done.stdout)  # what the command itself prints; progress goes to stderr
    straight, again = report(ladder, "healed"), report(ladder, "healed_again")
    assert again["weights_sha256"] == straight["weights_sha256"]
    assert again["verification"]["validation"] == straight["verification"]["validation"]


def test_the_loss_before_healing_is_the_loss_of_what_is_healed(ladder: Ladder) -> None:
    before = report(ladder, "random")["verification"]["validation"]["valid/loss/total"]["after"]
    loss = report(ladder, "healed")["verification"]["validation"]["valid/loss/total"]
    assert loss["before"] == before
    assert loss["after"] < before


def test_a_healing_reads_on_where_the_training_below_stopped(ladder: Ladder, dataset: Path) -> None:
    """The conversion between the two passes it on."""
    sha256, rows = read_manifest(dataset).sha256, STEPS * RUN["global_batch_size"]
    read = {name: report(ladder, name)["rows_read"] for name in ("random", "imported", "healed")}
    assert read == {"random": {sha256: rows}, "imported": {sha256: rows}, "healed": {sha256: 2 * rows}}
    assert load_config(Path(ladder.get("random").path) / "training" / "config.yaml").data.skip_rows is None
    assert load_config(Path(ladder.get("healed").path) / "training" / "config.yaml").data.skip_rows == [rows]


def test_frozen_parameters_are_the_input_s(ladder: Ladder) -> None:
    before, after = weights(ladder, "imported"), weights(ladder, "healed")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("embedding.") or ".mlp." in name}
    verification = report(ladder, "healed")["verification"]
    assert verification["frozen_tensors_bit_identical"] == len(before) - len(changed)


def test_healing_is_the_ordinary_training(ladder: Ladder, dataset: Path, tmp_path: Path) -> None:
    """``scripts/train.sh CONFIG --load-weights OBJECT/megatron``, as the docs have it, ends with the job's weights."""
    start = Path(ladder.get("imported").path) / "megatron"
    paths = {"data_path": dataset, "run_dir": tmp_path / "run", "load_weights": start}
    words = [
        f"{ROOT}/scripts/train.sh",
        QWEN3,
        *flags({**HEALING, "skip_rows": [STEPS * RUN["global_batch_size"]]}),
        *flags({name: str(path) for name, path in paths.items()}),
    ]
    done = subprocess.run(
        words, env=training_runs.ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"weights from {start}" in done.stdout
    found = megatron_checkpoint.read_weights(tmp_path / "run" / "checkpoints" / f"iter_{STEPS:07d}")
    assert {name: tensor_sha256(tensor.read()) for name, tensor in found.items()} == weights(ladder, "healed")


def test_what_decides_the_weights_is_in_the_key_and_nothing_else(ladder: Ladder, dataset: Path, tmp_path: Path) -> None:
    """What is logged, saved and shown leaves a finished object valid; the message names the field that does not."""
    root = ladder.path.parent

    def due(**changes: object) -> str | None:
        return runner.plan(write_ladder(root, dataset, **changes), "random").step.state().due

    try:
        assert due(log_interval=2, save_interval=5, wandb_mode="offline", run_name="other") is None
        assert due(data_path=shutil.copytree(dataset, tmp_path / "moved").as_posix()) is None
        assert due(lr_warmup_iters=3) == "it was made under another key: training.optim.lr_warmup_iters: 2 -> 3"
        with pytest.raises(NotOursError, match=r"training\.optim\.lr_warmup_iters: 2 -> 3"):
            runner.run(runner.plan(write_ladder(root, dataset, lr_warmup_iters=3), "random"), quiet=True)
        other = Path(shutil.copytree(dataset, tmp_path / "set"))
        rewrite_manifest(other, lambda manifest: manifest.update(git={"sha": "another commit"}))
        assert due(data_path=str(other)) is None
        rewrite_manifest(other, lambda manifest: manifest.update(prompts={"system": "another"}))
        assert "dataset_manifests_sha256" in str(due(data_path=str(other)))
    finally:
        write_ladder(root, dataset)
    assert due() is None


def test_an_interrupted_training_survives_a_changed_logging_field(
    ladder: Ladder, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days of training lie in the partial folder: they are gone on with, or kept until somebody asks for them to go."""

    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, forked_commands():
        patched.setattr(training_jobs, "training_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(runner.plan(write_ladder(tmp_path, dataset), "random"), quiet=True)
    last = tmp_path / "random.partial" / "scratch" / "run" / "checkpoints" / f"iter_{STEPS:07d}" / "files.json"
    written = last.stat().st_mtime_ns
    with pytest.raises(NotOursError, match=r"unfinished work lies here.*training\.training\.seed"):
        runner.run(runner.plan(write_ladder(tmp_path, dataset, seed=7), "random"), quiet=True)
    assert last.stat().st_mtime_ns == written
    with monkeypatch.context() as patched, forked_commands():
        patched.setattr(training_jobs, "training_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(runner.plan(write_ladder(tmp_path, dataset, log_interval=5), "random"), quiet=True)
    assert last.stat().st_mtime_ns == written


def test_errors_of_the_training_are_one_message(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ladder = write_ladder(tmp_path, tmp_path / "nothing")
    with pytest.raises(DataError, match="build it with"):
        runner.plan(ladder, "random")
    damaged = Path(shutil.copytree(dataset, tmp_path / "set"))
    ladder = write_ladder(tmp_path, damaged)
    lost = next((damaged / "train").glob("*tokens*.bin"))
    lost.unlink()
    with pytest.raises(UpcycleError, match="ended with exit code 2"):
        runner.run(runner.plan(ladder, "random"), quiet=True)
    said = capfd.readouterr().err
    assert said.count("error:") == 1 and lost.name in said and "Traceback" not in said
    assert not (tmp_path / "random").exists()
