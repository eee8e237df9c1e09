"""Jobs that train: ``pretrain`` from random weights, ``heal`` from those of the rung below.

The training is the ordinary one (what ``scripts/train.sh`` starts, with its checks, processes and checkpoints) into the
job's scratch: an interrupted job goes on from the run's newest checkpoint. The product is the weights of its last one.
The object's ``training/`` keeps the run's metrics, configuration and assignment table.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from megatron_vpmoe.config import RunConfig, config_hash, geometry_diff, load_config
from megatron_vpmoe.config.parameters import is_trained
from megatron_vpmoe.data.manifest import read_manifest
from megatron_vpmoe.metrics import read_records
from vpmoe.commands import Command, CommandFailed, run_command
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.job import Job, JobSettings, Product, Task
from vpmoe.upcycle.registry import flags
from vpmoe.upcycle.rung_below import RungBelow, below_and_written, refuse_other_changes
from vpmoe.upcycle.training_receipt import router_report, training_report, validation_report
from vpmoe.weights.tensors import tensor_sha256

LAUNCHER = "megatron_vpmoe.launch"
KEPT = ("metrics.jsonl", "config.yaml", "assignment.json")
"""Files of the run that the object keeps."""


class TrainingSettings(JobSettings):
    """Settings of ``pretrain`` and ``heal``."""

    config: str = Field(min_length=1)
    """YAML of the run; its ``model`` and ``moe`` sections have to be the object's geometry."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields that differ from ``config``, by name; "null" for none."""


class Pretrain(Job[TrainingSettings]):
    """No input -> a model trained from random weights."""

    name: ClassVar[str] = "pretrain"
    roles: ClassVar[tuple[str, ...]] = ()
    settings_type = TrainingSettings

    def decides(self, settings: TrainingSettings) -> dict[str, Any]:
        cfg = training_config(settings)
        manifests = {part.label: read_manifest(part.path).sha256 for part in cfg.data.parts}
        return {"config_sha256": config_hash(cfg), "dataset_manifest_sha256": manifests}

    def convert(self, task: Task[TrainingSettings]) -> Product:
        trained = RungBelow.of_checkpoint(train(task, training_config(task.settings)), task.cfg)
        return trained.product(task.cfg, trained.weights)

    def verify(self, task: Task[TrainingSettings], folder: Path) -> dict[str, Any]:
        run = run_directory(task)
        (folder / "training").mkdir(exist_ok=True)
        for name in KEPT:
            shutil.copyfile(run / name, folder / "training" / name)
        last = training_config(task.settings).training.train_iters
        return {"validation": validation_report(read_records(run / "metrics.jsonl"), last, source=task.spec.id)}


class Heal(Pretrain):
    """``model`` (any rung) -> the same geometry after training on."""

    name: ClassVar[str] = "heal"
    roles: ClassVar[tuple[str, ...]] = ("model",)

    def convert(self, task: Task[TrainingSettings]) -> Product:
        refuse_other_changes(task, RungBelow.open(task.inputs["model"]), ())
        return super().convert(task)

    def verify(self, task: Task[TrainingSettings], folder: Path) -> dict[str, Any]:
        below, written = below_and_written(task, folder)
        cfg = training_config(task.settings)
        # An expert bias is no parameter; it goes with its router's weight.
        frozen = [
            name for name in below.weights if not is_trained(cfg, name.replace("router.expert_bias", "router.weight"))
        ]
        for name in frozen:
            before = below.weights[name].to(written[name].dtype)
            if tensor_sha256(before.read()) != tensor_sha256(written[name].read()):
                raise UpcycleError(
                    f"{name} changed, and train_only leaves it out",
                    source=task.spec.id,
                    remedy="the training is wrong; report it",
                )
        return {**super().verify(task, folder), "frozen_tensors_bit_identical": len(frozen)}


def training_config(settings: TrainingSettings) -> RunConfig:
    """The run's configuration, before what the job decides (directory, start, resumption).

    Raises:
        ConfigError: the YAML, or an override, is wrong.
        UpcycleError: it says what the job decides, or never validates.
    """
    cfg = load_config(Path(settings.config), flags(settings.overrides))
    taken = [
        name
        for name, value in (("run_dir", cfg.training.run_dir), ("load_weights", cfg.checkpoint.load_weights))
        if value is not None
    ]
    if taken:
        raise UpcycleError(
            f"{' and '.join(taken)}: the job decides that", source=settings.config, remedy="leave it null"
        )
    if cfg.evaluation.eval_interval is None:
        raise UpcycleError(
            "eval_interval is null, and the receipt is to tell the validation loss before and after",
            source=settings.config,
            remedy="set eval_interval, such as to train_iters",
        )
    return cfg


def run_directory(task: Task[TrainingSettings]) -> Path:
    """Where the job's run lies until the object is done."""
    return task.scratch / "run"


def train(task: Task[TrainingSettings], cfg: RunConfig) -> Path:
    """Run the training to its end, from its newest checkpoint if there is one; returns its last checkpoint.

    Adds ``training`` and, where there are experts, ``router_health`` to the report.

    Raises:
        UpcycleError: another geometry than the object's, or a training that ended before its last iteration.
        Interrupted: by a signal; the training has saved.
    """
    from megatron_vpmoe.training.checkpoint import open_checkpoint

    differing = [str(change) for change in geometry_diff(task.cfg, cfg)]
    if differing:
        raise UpcycleError(
            "the training's geometry is not the object's (object -> training):\n    " + "\n    ".join(differing),
            source=f"{task.spec.id}: {task.settings.config}",
            remedy="correct the overrides of one of the two",
        )
    directory = run_directory(task)
    decided = {"run_dir": str(directory), "resume": True, "eval_at_start": True}
    if "model" in task.inputs:
        decided["load_weights"] = str(task.inputs["model"].checkpoint)
    words = flags({**task.settings.overrides, **decided})
    try:
        run_command(Command(("python", "-m", LAUNCHER, task.settings.config, *words)), Path.cwd(), to_stderr=True)
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
    records = read_records(directory / "metrics.jsonl")
    task.report["training"] = training_report(records, cfg, skipped_steps=int(found.state["skipped_steps"]))
    if cfg.moe.num_experts is not None:
        task.report["router_health"] = router_report(records, cfg.training.train_iters)
    return found.path
