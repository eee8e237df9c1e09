"""Jobs that train: ``pretrain`` from random weights, ``heal`` from those of the object below; with a teacher or none.

The training is the ordinary one (what ``vpmoe train`` starts, with its checks, processes and checkpoints) into the
job's scratch: an interrupted job goes on from the run's newest checkpoint. The product is the weights of its last one,
with its provenance.
The object's ``training/`` keeps the run's metrics, configuration, assignment table and identity; the run store finds
the run there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from megatron_vpmoe.config import RunConfig, deciding_fields, geometry_diff, load_config
from megatron_vpmoe.config.parameters import is_trained
from megatron_vpmoe.files import sha256_of_file, write_atomically
from megatron_vpmoe.manifest import read_manifest, read_sealed
from megatron_vpmoe.metrics import read_records
from megatron_vpmoe.metrics.records import to_stderr
from megatron_vpmoe.metrics.run_store import IDENTITY, moved, store_path
from vpmoe.commands import Command, CommandFailed, run_command
from vpmoe.errors import UpcycleError, VpmoeError
from vpmoe.upcycle.job import Job, JobSettings, Product, Task
from vpmoe.upcycle.ladder_file import ObjectSpec, flags, geometry
from vpmoe.upcycle.rung_below import RungBelow, below_and_written, refuse_changed, refuse_other_changes
from vpmoe.upcycle.training_receipt import router_report, training_report, validation_report
from vpmoe.weights import megatron_checkpoint

LAUNCHER = "megatron_vpmoe.launch"
KEPT = ("metrics.jsonl", "config.yaml", "assignment.json", IDENTITY)
"""Files of the run that the object keeps."""


class TrainingSettings(JobSettings):
    """Settings of ``pretrain`` and ``heal``."""

    config: str = Field(min_length=1)
    """YAML of what several trainings share, laid over the object's own ``config``."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields that differ from these two, by name; "null" for none."""
    score: str | None = None
    """Words of ``vpmoe data score``, such as "--top-k 64": the input ``teacher`` scores the dataset ahead of time, and
    the training reads the scored one. Null: it is asked in every step (``training.teacher_weights``)."""


class Pretrain(Job[TrainingSettings]):
    """No input but perhaps a ``teacher`` -> a model trained from random weights."""

    name: ClassVar[str] = "pretrain"
    roles: ClassVar[tuple[str, ...]] = ()
    optional_roles: ClassVar[tuple[str, ...]] = ("teacher",)
    settings_type = TrainingSettings

    def decides(self, spec: ObjectSpec, settings: TrainingSettings) -> dict[str, Any]:
        """What of the run's configuration decides its weights, datasets, prompts, frozen models; not what it logs."""
        from megatron_vpmoe.training.checkpoint_files import FILES, open_checkpoint

        cfg = training_config(spec, settings)
        manifests = [read_manifest(part.path).sha256 for part in cfg.data.parts]
        training = deciding_fields(cfg)
        if "teacher" in spec.inputs:  # an input's identity is in the key anyway
            training["training"].pop("teacher_weights", None)
        for name in ("reference_weights", "teacher_weights"):
            if (path := training["training"].get(name)) is not None:  # what lies there decides, not where
                training["training"][name] = sha256_of_file(open_checkpoint(Path(path)).path / FILES)
        decides = {"training": training, "dtype": settings.dtype, "dataset_manifests_sha256": manifests}
        if (prompts := _prompts_sha256(cfg)) is not None:
            decides["rollout_prompts_sha256"] = prompts
        return decides if settings.score is None else {**decides, "score": settings.score}

    def convert(self, task: Task[TrainingSettings]) -> Product:
        last = train(task)
        trained = RungBelow.of_checkpoint(last, task.cfg)
        product = trained.product(task.cfg, trained.weights)
        told = {"provenance": megatron_checkpoint.read_state(last)["provenance"]}
        return replace(product, run_state={**product.run_state, **told})

    def verify(self, task: Task[TrainingSettings], folder: Path) -> dict[str, Any]:
        run = run_directory(task)
        (folder / "training").mkdir(exist_ok=True)
        for name in KEPT:
            if name != IDENTITY or (run / name).is_file():  # older runs have none
                shutil.copyfile(run / name, folder / "training" / name)
        cfg = training_config(task.spec, task.settings)
        last = cfg.training.train_iters
        try:
            moved(store_path(cfg.logging.run_store), folder / "training")
        except VpmoeError as error:  # the object is none the worse
            to_stderr(f"the run store does not know where the run is kept: {error.what}")
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


def write_run(
    folder: Path, spec: ObjectSpec, settings: TrainingSettings, decided: Mapping[str, Any]
) -> tuple[Path, list[str]]:
    """The training as a user would start it: ``folder/run.yaml``, and the words of the command line after it.

    Args:
        decided: fields by name, whatever the two YAMLs and the overrides say.
    """
    assert spec.config is not None
    path = folder / "run.yaml"
    parents = [os.path.realpath(parent) for parent in (spec.config, settings.config)]
    write_atomically(path, f"extends: {json.dumps(parents)}\n".encode())
    return path, flags({"run_name": spec.id, **spec.overrides, **settings.overrides, **decided})


def training_config(spec: ObjectSpec, settings: TrainingSettings) -> RunConfig:
    """The run's configuration, before what the job decides (directory, start, resumption).

    Raises:
        ConfigError: a YAML, or an override, is wrong.
        UpcycleError: it says what the job decides, never validates, or has another geometry than the object.
    """
    place = f"objects.{spec.id}.settings, {settings.config}"
    # What a YAML says of a run by itself gives way to an input; what is said here would be in vain.
    fields = {"model": {"load_weights": "null"}, "teacher": {"teacher_weights": "teacher"}}
    given = {name: value for role in spec.inputs for name, value in fields.get(role, {}).items()}
    taken = [name for name in given if name in settings.overrides]
    with tempfile.TemporaryDirectory() as folder:
        path, words = write_run(Path(folder), spec, settings, given)
        cfg = load_config(path, words)
    taken += [
        name
        for name, value in (("run_dir", cfg.training.run_dir), ("load_weights", cfg.checkpoint.load_weights))
        if value is not None
    ]
    if taken:
        raise UpcycleError(f"{' and '.join(taken)}: the job decides that", source=place, remedy="leave it null")
    if settings.score is not None and not ("teacher" in spec.inputs and cfg.training.objective == "topk_kd"):
        raise UpcycleError(
            f"score = {settings.score!r}, and {cfg.training.objective} with the inputs "
            f"{', '.join(spec.inputs) or 'none'} reads no records of a teacher's",
            source=place,
            remedy="leave it out, or ask for topk_kd with an input teacher",
        )
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

    Adds ``training``, ``rows_read`` and, where there are experts, ``router_health`` to the report; where the teacher
    scored the dataset, ``scored``.

    Raises:
        UpcycleError: a training that ended before its last iteration.
        Interrupted: by a signal; the training has saved.
    """
    from megatron_vpmoe.training.checkpoint import open_checkpoint

    cfg = training_config(task.spec, task.settings)
    directory = run_directory(task)
    decided = {"run_dir": str(directory), "resume": True, "eval_at_start": True}
    if cfg.logging.experiment is None:
        decided["experiment"] = Path(task.spec.path).resolve().parent.name
    if "model" in task.inputs:
        decided["load_weights"] = str(task.inputs["model"].checkpoint)
    if task.settings.score is not None:
        decided |= {"data_path": str(_score(task, cfg.data.parts[0].path)), "teacher_weights": "null"}
    elif "teacher" in task.inputs:
        decided["teacher_weights"] = str(task.inputs["teacher"].checkpoint)
    documents = [read_manifest(part.path).documents_sha256 for part in cfg.data.parts]
    behind = cfg.data.skip_rows or [0] * len(documents)
    behind = [rows + task.rows_read.get(sha256, 0) for rows, sha256 in zip(behind, documents, strict=True)]
    if any(behind) and _reads_rows(cfg):
        decided["skip_rows"] = behind
    path, words = write_run(task.scratch, task.spec, task.settings, decided)
    try:
        run_command(Command(("python", "-m", LAUNCHER, str(path), *words)), Path.cwd(), to_stderr=True)
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
    task.report["rows_read"] = task.rows_read
    if _reads_rows(cfg):
        data = found.state["data"]
        cursors = data["anchor"]["cursors"] if cfg.samples else data
        read = [rows + cursor["samples"] for rows, cursor in zip(behind, cursors, strict=True)]
        task.report["rows_read"] = {**task.rows_read, **dict(zip(documents, read, strict=True))}
    if cfg.moe.num_experts is not None:
        task.report["router_health"] = router_report(records, cfg.training.train_iters)
    return found.path


def _score(task: Task[TrainingSettings], dataset: str) -> Path:
    """The dataset with the teacher's records, in the job's scratch; what its manifest tells of them is reported."""
    assert task.settings.score is not None
    scored, teacher = task.scratch / "scored", task.inputs["teacher"].spec.path
    asked = ("--teacher", teacher, "--output-dir", str(scored), *shlex.split(task.settings.score))
    run_command(Command(("vpmoe", "data", "score", dataset, *asked)), Path.cwd(), to_stderr=True)
    task.report["scored"] = read_sealed(scored, "score it again")["annotated"][-1]
    return scored


def _reads_rows(cfg: RunConfig) -> bool:
    """Whether rows of the datasets are trained on, in their order: where answers are sampled, those of an anchor."""
    return not cfg.samples or (cfg.training.objective == "on_policy" and cfg.training.opd_anchor_share > 0)


def _prompts_sha256(cfg: RunConfig) -> str | None:
    """Of the file that answers are sampled to; None: it is the dataset."""
    if not cfg.samples or cfg.rollouts.rollout_prompts is None:
        return None
    for path in filter(None, (cfg.rollouts.rollout_prompts, cfg.rollouts.rollout_valid_prompts)):
        if not Path(path).is_file():
            raise UpcycleError("there are no prompts", source=path, remedy="write them: vpmoe data prompts")
    return sha256_of_file(Path(cfg.rollouts.rollout_prompts))
