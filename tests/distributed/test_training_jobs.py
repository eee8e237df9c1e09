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

from megatron_vpmoe.errors import DataError
from tests import training_runs
from tests.fixtures_dataset import rewrite_manifest
from tests.golden.test_vocabulary_travels import WORDS
from tests.golden.test_vocabulary_travels import dataset as text_dataset
from tests.tiny import ROOT
from vpmoe.errors import UpcycleError
from vpmoe.upcycle import runner
from vpmoe.upcycle.registry import Registry, flags, load_registry
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
    "random": ("pretrain", {"config": QWEN3, "overrides": RUN}, {}),
    "imported": ("import_qwen3", {"prompt_lengths": [5], "greedy_steps": 4}, {"source": "random"}),
    "healed": ("heal", {"config": QWEN3, "overrides": HEALING}, {"model": "imported"}),
    "healed_again": ("heal", {"config": QWEN3, "overrides": HEALING}, {"model": "imported"}),
}


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def write_registry(root: Path, dataset: Path) -> Registry:
    objects = []
    for name, (job, settings, inputs) in JOBS.items():
        if "overrides" in settings:
            settings = {**settings, "overrides": {**settings["overrides"], "data_path": str(dataset)}}
        lines = [f"{key} = {toml(value)}" for key, value in settings.items()]
        (root / f"{name}.toml").write_text("\n".join([f'object = "{name}"', f'job = "{job}"', "[settings]", *lines]))
        objects.append(
            f'[{name}]\nkind = "derived"\nrung = 0\npath = "{root}/{name}"\nconfig = "{QWEN3}"\n'
            f'overrides = {toml(GEOMETRY)}\njob = "{root}/{name}.toml"\ninputs = {toml(inputs)}\n'
        )
    (root / "objects.toml").write_text("\n".join(objects))
    return load_registry(root / "objects.toml")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_dataset(tmp_path_factory.mktemp("data") / "text", " ".join(WORDS))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Registry:
    """``random`` and ``imported`` are made."""
    registry = write_registry(tmp_path_factory.mktemp("ladder"), dataset)
    for name in ("random", "imported"):
        runner.run(runner.plan(registry, name), quiet=True)
    return registry


def weights(registry: Registry, name: str) -> dict[str, str]:
    """Hashes of an object's tensors."""
    stored = megatron_checkpoint.read_weights(Path(registry.get(name).path) / "megatron" / "iter_0000000")
    return {name: tensor_sha256(tensor.read()) for name, tensor in stored.items()}


def receipt(registry: Registry, name: str) -> dict[str, Any]:
    return json.loads((Path(registry.get(name).path) / "receipt.json").read_text())


def test_pretrain_makes_an_object_of_a_training(registry: Registry) -> None:
    made = receipt(registry, "random")
    assert made["inputs"] == {}
    loss = made["verification"]["validation"]["valid/loss/total"]
    assert loss["after"] < loss["before"]
    assert made["report"]["training"]["steps"] == made["report"]["training"]["logged_steps"] == STEPS
    files = made["outputs"]["files"]
    assert {
        "training/metrics.jsonl",
        "training/config.yaml",
        "hf/config.json",
        "hf/tokenizer_config.json",
    } <= files.keys()


def test_a_derived_object_serves_as_a_source(registry: Registry) -> None:
    random, imported = receipt(registry, "random"), receipt(registry, "imported")
    assert imported["inputs"]["source"]["object"] == "random"
    assert imported["outputs"]["weights_sha256"] == random["outputs"]["weights_sha256"]


def test_killed_in_the_middle_it_goes_on_to_the_same_weights(registry: Registry) -> None:
    runner.run(runner.plan(registry, "healed"), quiet=True)
    folder = Path(registry.get("healed_again").path)
    run = folder.with_name("healed_again.partial") / "scratch" / "run"
    words = [sys.executable, "-m", "vpmoe.cli", "upcycle", "run", "healed_again", "--objects", str(registry.path)]
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
    straight, again = receipt(registry, "healed"), receipt(registry, "healed_again")
    assert again["outputs"]["weights_sha256"] == straight["outputs"]["weights_sha256"]
    assert again["verification"]["validation"] == straight["verification"]["validation"]


def test_the_loss_before_healing_is_the_loss_of_what_is_healed(registry: Registry) -> None:
    before = receipt(registry, "random")["verification"]["validation"]["valid/loss/total"]["after"]
    loss = receipt(registry, "healed")["verification"]["validation"]["valid/loss/total"]
    assert loss["before"] == before
    assert loss["after"] < before


def test_frozen_parameters_are_the_input_s(registry: Registry) -> None:
    before, after = weights(registry, "imported"), weights(registry, "healed")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("embedding.") or ".mlp." in name}
    verification = receipt(registry, "healed")["verification"]
    assert verification["frozen_tensors_bit_identical"] == len(before) - len(changed)


def test_healing_is_the_ordinary_training(registry: Registry, dataset: Path, tmp_path: Path) -> None:
    """``scripts/train.sh CONFIG --load-weights OBJECT/megatron``, as the docs have it, ends with the job's weights."""
    start = Path(registry.get("imported").path) / "megatron"
    paths = {"data_path": dataset, "run_dir": tmp_path / "run", "load_weights": start}
    words = [
        f"{ROOT}/scripts/train.sh",
        QWEN3,
        *flags({**HEALING, **{name: str(path) for name, path in paths.items()}}),
    ]
    done = subprocess.run(
        words, env=training_runs.ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"weights from {start}" in done.stdout
    found = megatron_checkpoint.read_weights(tmp_path / "run" / "checkpoints" / f"iter_{STEPS:07d}")
    assert {name: tensor_sha256(tensor.read()) for name, tensor in found.items()} == weights(registry, "healed")


def test_the_key_covers_configuration_and_data(registry: Registry, dataset: Path, tmp_path: Path) -> None:
    key = runner.plan(registry, "random").key
    job = Path(registry.get("random").job or "")
    text = job.read_text()
    try:
        job.write_text(text.replace('"lr_warmup_iters" = 2', '"lr_warmup_iters" = 3').replace("iters = 2", "iters = 3"))
        assert runner.plan(registry, "random").key != key
    finally:
        job.write_text(text)
    assert runner.plan(registry, "random").key == key
    other = Path(shutil.copytree(dataset, tmp_path / "set"))
    job_of_other = write_registry(tmp_path, other)
    before = runner.plan(job_of_other, "random").key
    rewrite_manifest(other, lambda manifest: manifest.update(made="still later"))
    assert runner.plan(job_of_other, "random").key != before


def test_errors_of_the_training_are_one_message(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    registry = write_registry(tmp_path, tmp_path / "nothing")
    with pytest.raises(DataError, match="build it with"):
        runner.plan(registry, "random")
    damaged = Path(shutil.copytree(dataset, tmp_path / "set"))
    registry = write_registry(tmp_path, damaged)
    lost = next((damaged / "train").glob("*tokens*.bin"))
    lost.unlink()
    with pytest.raises(UpcycleError, match="ended with exit code 2"):
        runner.run(runner.plan(registry, "random"), quiet=True)
    said = capfd.readouterr().err
    assert said.count("error:") == 1 and lost.name in said and "Traceback" not in said
    assert not (tmp_path / "random").exists()
