"""Jobs that train: ``pretrain`` from random weights, ``heal`` from those of the rung below.

The training is the ordinary one (what ``vpmoe train`` starts, with its checks, processes and checkpoints) into the
job's scratch: an interrupted job goes on from the run's newest checkpoint. The product is the weights of its last one.
The object's ``training/`` keeps the run's metrics, configuration and assignment table.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from megatron_vpmoe.config import RunConfig, deciding_fields, geometry_diff, load_config
from megatron_vpmoe.config.parameters import is_trained
from megatron_vpmoe.files import sha256_of_file, write_atomically
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.metrics import read_records
from vpmoe.commands import Command, CommandFailed, run_command
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.job import Job, JobSettings, Product, Task
from vpmoe.upcycle.ladder_file import ObjectSpec, flags, geometry
from vpmoe.upcycle.rung_below import RungBelow, below_and_written, refuse_changed, refuse_other_changes
from vpmoe.upcycle.training_receipt import router_report, training_report, validation_report

LAUNCHER = "megatron_vpmoe.launch"
KEPT = ("metrics.jsonl", "config.yaml", "assignment.json")
"""Files of the run that the object keeps."""


class TrainingSettings(JobSettings):
    """Settings of ``pretrain`` and ``heal``."""

    config: str = Field(min_length=1)
    """YAML of what several trainings share, laid over the object's own ``config``."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields that differ from these two, by name; "null" for none."""


class Pretrain(Job[TrainingSettings]):
    """No input -> a model trained from random weights."""

    name: ClassVar[str] = "pretrain"
    roles: ClassVar[tuple[str, ...]] = ()
    settings_type = TrainingSettings

    def decides(self, spec: ObjectSpec, settings: TrainingSettings) -> dict[str, Any]:
        """What of the run's configuration decides its weights, the datasets and frozen models; not what it logs."""
        from megatron_vpmoe.training.checkpoint_files import FILES, open_checkpoint

        cfg = training_config(spec, settings)
        manifests = [read_manifest(part.path).sha256 for part in cfg.data.parts]
        decides = deciding_fields(cfg)
        for name in ("reference_weights", "teacher_weights"):
            if (path := decides["training"].get(name)) is not None:  # what lies there decides, not where
                decides["training"][name] = sha256_of_file(open_checkpoint(Path(path)).path / FILES)
        return {"training": decides, "dtype": settings.dtype, "dataset_manifests_sha256": manifests}

    def convert(self, task: Task[TrainingSettings]) -> Product:
        trained = RungBelow.of_checkpoint(train(task), task.cfg)
        return trained.product(task.cfg, trained.weights)

    def verify(self, task: Task[TrainingSettings], folder: Path) -> dict[str, Any]:
        run = run_directory(task)
        (folder / "training").mkdir(exist_ok=True)
        for name in KEPT:
            shutil.copyfile(run / name, folder / "training" / name)
        last = training_config(task.spec, task.settings).training.train_iters
        return {"validation": validation_report(read_records(run / "metrics.jsonl"), last, source=task.spec.id)}


class Heal(Pretrain):
    """``model`` (any rung) -> the same geometry after training on, with rows that no training below it has read."""

    name: ClassVar[str] = "heal"
    version: ClassVar[int] = 2
    roles: ClassVar[tuple[str, ...]] = ("model",)

    def convert(self, task: Task[TrainingSettings]) -> Product:
        refuse_other_changes(task, RungBelow.open(task.inputs["model"]), ())
        return super().convert(task)

    def verify(self, task: Task[TrainingSettings], folder: Path) -> dict[str, Any]:
        below, written = below_and_written(task, folder)
        cfg = training_config(task.spec, task.settings)
        # An expert bias is no parameter; it goes with its router's weight.
        frozen = {
            name: name
            for name in below.weights
            if not is_trained(cfg, name.replace("router.expert_bias", "router.weight"))
        }
        refuse_changed(task, below.weights, written, frozen, what="train_only leaves it out")
        return {**super().verify(task, folder), "frozen_tensors_bit_identical": len(frozen)}


def write_run(folder: Path, spec: ObjectSpec, settings: TrainingSettings) -> tuple[Path, list[str]]:
    """The training as a user would start it: ``folder/run.yaml``, and the words of the command line after it."""
    assert spec.config is not None
    path = folder / "run.yaml"
    parents = [os.path.realpath(parent) for parent in (spec.config, settings.config)]
    write_atomically(path, f"extends: {json.dumps(parents)}\n".encode())
    return path, flags({"run_name": spec.id, **spec.overrides, **settings.overrides})


def training_config(spec: ObjectSpec, settings: TrainingSettings) -> RunConfig:
    """The run's configuration, before what the job decides (directory, start, resumption).

    Raises:
        ConfigError: a YAML, or an override, is wrong.
        UpcycleError: it says what the job decides, never validates, or has another geometry than the object.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, words = write_run(Path(folder), spec, settings)
        cfg = load_config(path, words)
    taken = [
        name
        for name, value in (("run_dir", cfg.training.run_dir), ("load_weights", cfg.checkpoint.load_weights))
        if value is not None
    ]
    place = f"objects.{spec.id}.settings, {settings.config}"
    if taken:
        raise UpcycleError(f"{' and '.join(taken)}: the job decides that", source=place, remedy="leave it null")
    if cfg.evaluation.eval_interval is None:
        raise UpcycleError(
            "eval_interval is null, and the receipt is to tell the validation loss before and after",
            source=place,
            remedy="set eval_interval, such as to train_iters",
        )
    declared = geometry(spec)
    assert declared is not None
    if differing := [str(change) for change in geometry_diff(declared, cfg)]:
        raise UpcycleError(
            "the training's geometry is not the object's (object -> training):\n    " + "\n    ".join(differing),
            source=place,
            remedy="model and moe are declared by the object's config and overrides",
        )
    return cfg


def run_directory(task: Task[TrainingSettings]) -> Path:
    """Where the job's run lies until the object is done."""
    return task.scratch / "run"


def train(task: Task[TrainingSettings]) -> Path:
    """Run the training to its end, from its newest checkpoint if there is one; returns its last checkpoint.

    Adds ``training``, ``rows_read`` and, where there are experts, ``router_health`` to the report.

    Raises:
        UpcycleError: a training that ended before its last iteration.
        Interrupted: by a signal; the training has saved.
    """
    from megatron_vpmoe.training.checkpoint import open_checkpoint

    cfg = training_config(task.spec, task.settings)
    directory = run_directory(task)
    decided = {"run_dir": str(directory), "resume": True, "eval_at_start": True}
    if "model" in task.inputs:
        decided["load_weights"] = str(task.inputs["model"].checkpoint)
    manifests = [read_manifest(part.path).sha256 for part in cfg.data.parts]
    behind = cfg.data.skip_rows or [0] * len(manifests)
    behind = [rows + task.rows_read.get(sha256, 0) for rows, sha256 in zip(behind, manifests, strict=True)]
    if any(behind):
        decided["skip_rows"] = behind
    path, words = write_run(task.scratch, task.spec, task.settings)
    try:
        run_command(Command(("python", "-m", LAUNCHER, str(path), *words, *flags(decided))), Path.cwd(), to_stderr=True)
    except CommandFailed as error:
        raise UpcycleError(
            f"the training ended with exit code {error.exit_code}; its own message is above",
            source=f"{task.spec.id}: {directory}",
            remedy=f"after mending it, vpmoe upcycle run {task.spec.id} goes on from the last checkpoint",
        ) from error
    found = open_checkpoint(directory)
    if found.iteration != cfg.training.train_iters:
        raise UpcycleError(
            f"the training stopped at iteration {found.iteration} of {cfg.training.train_iters}",
            source=f"{task.spec.id}: {found.path}",
            remedy=f"vpmoe upcycle run {task.spec.id} goes on from there",
        )
    records = read_records(metrics := directory / "metrics.jsonl")
    skipped = int(found.state["skipped_steps"])
    task.report["training"] = training_report(records, cfg, skipped_steps=skipped, source=str(metrics))
    read = [rows + cursor["samples"] for rows, cursor in zip(behind, found.state["data"], strict=True)]
    task.report["rows_read"] = {**task.rows_read, **dict(zip(manifests, read, strict=True))}
    if cfg.moe.num_experts is not None:
        task.report["router_health"] = router_report(records, cfg.training.train_iters)
    return found.path
