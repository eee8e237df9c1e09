"""What is checked before a run starts any process: does the machine hold it, and is the dataset whole."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

from megatron_vpmoe.config import RunConfig, check_fit, fit_report
from megatron_vpmoe.config.fit import FitReport
from megatron_vpmoe.config.parameters import parameter_sizes
from megatron_vpmoe.config.yaml_source import extended_paths
from megatron_vpmoe.data.blend import open_parts
from megatron_vpmoe.errors import CheckpointError, ConfigError, DeviceError
from megatron_vpmoe.files import place_of
from megatron_vpmoe.metrics.run_store import LOCK, check_store, store_path
from megatron_vpmoe.ownership import check_free
from megatron_vpmoe.runtime.notices import PreemptionFile

Answer = TypeVar("Answer")


def check_machine(cfg: RunConfig, config_path: Path) -> FitReport:
    """Refuse a run that this machine cannot hold; returns what was compared.

    Raises:
        DeviceError: too little memory, more processes than GPUs, nothing to compile with, or a format of the experts
            that is not for this machine.
    """
    from megatron_vpmoe.runtime import device, expert_formats

    report = machine_report(cfg)
    check_fit(cfg, report, nano_counterpart(config_path))
    if cfg.training.compile != "off" and report.device_kind == "CPU":
        device.check_compiler("training.compile", "set --compile off")
    if report.device_kind != "CPU" and report.processes_per_device > 1:
        raise DeviceError(
            f"{cfg.parallel.nproc_per_node} processes are too many: {report.processes_per_device} would share one "
            f"{report.device_kind}",
            source="parallel.nproc_per_node",
            remedy="one process a GPU: lower --nproc-per-node, and --expert-model-parallel-size with it",
        )
    if cfg.moe.num_experts is not None and cfg.moe.experts_precision is not None:
        widths = cfg.model.hidden_size, cfg.moe.moe_ffn_hidden_size
        capability = _of_device(device.compute_capability)
        expert_formats.check_format(cfg.moe.experts_precision, *widths, capability)
    return report


def machine_report(cfg: RunConfig) -> FitReport:
    """The memory estimate against this machine's devices."""
    from megatron_vpmoe.runtime import device

    return fit_report(cfg, *_of_device(device.available_memory), teacher_of(cfg))


def _of_device(ask: Callable[[], Answer]) -> Answer:
    """What a function of ``runtime.device`` answers."""
    from megatron_vpmoe.runtime import device

    if not device.has_gpu():
        return ask()
    # To ask a GPU opens a context on it for the life of the process: let a child do it.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ask).result()


def teacher_of(cfg: RunConfig) -> RunConfig | None:
    """``cfg`` with the geometry of its live teacher; None: it has none.

    Raises:
        CheckpointError: ``training.teacher_weights`` names no checkpoint that this run could ask.
    """
    if cfg.training.teacher_weights is None:
        return None
    from megatron_vpmoe.training.initial_weights import geometry_of

    return geometry_of(cfg, cfg.training.teacher_weights, "training.teacher_weights")[1]


def nano_counterpart(config_path: Path) -> str | None:
    """The configuration in the neighbouring ``nano/`` that extends this one, if there is one."""
    for candidate in sorted((config_path.parent / "nano").glob("*.yaml")):
        try:
            parents = extended_paths(candidate)
        except ConfigError:
            continue  # a hint on the way to another error; the file's own run will name what is wrong with it
        if os.path.realpath(config_path) in map(os.path.realpath, parents):
            return str(candidate)
    return None


def check_dataset(cfg: RunConfig) -> None:
    """Open both splits of every dataset as the workers will.

    Raises:
        DataError: a dataset is missing, incomplete or disagrees with itself, with ``seq_length`` or with another one.
        TokenizerError: it was built for another vocabulary than the model's.
    """
    from megatron_vpmoe.runtime import device

    device.prepare()
    for split in ("train", "valid"):
        open_parts(cfg, split)


def without_missing_teacher(cfg: RunConfig) -> tuple[RunConfig, list[str]]:
    """For an estimate: ``cfg`` without a teacher whose checkpoint is not there yet, and a line that says so."""
    try:
        teacher_of(cfg)
    except CheckpointError as error:
        weights = cfg.training.teacher_weights
        if weights is None or Path(weights).exists():
            raise
        training = cfg.training.model_copy(update={"teacher_weights": None})
        return cfg.model_copy(update={"training": training}), [f"the teacher is not counted: {error.what} ({weights})"]
    return cfg, []


def check_served_teacher(cfg: RunConfig) -> None:
    """Ask it as every worker will; raises what ``training.frozen.speak_to_teacher`` does."""
    if cfg.training.teacher_server is not None:
        from megatron_vpmoe.manifest import read_manifest
        from megatron_vpmoe.training.frozen import speak_to_teacher

        speak_to_teacher(cfg, read_manifest(cfg.data.parts[0].path)).close()


def check_suites(cfg: RunConfig) -> None:
    """Open every evaluation suite as the workers will; raises what ``training.suites.open_suites`` does."""
    if cfg.evaluation.eval_suites:
        from megatron_vpmoe.manifest import read_manifest
        from megatron_vpmoe.training.suites import open_suites

        open_suites(cfg, [read_manifest(part.path) for part in cfg.data.parts])


def check_run_directory(cfg: RunConfig) -> None:
    """Look at the place, the checkpoints that the run would start from or must not overwrite, and who is at work there.

    Raises:
        ConfigError: no folder can be made there, or written to, or it has no room for one checkpoint; or there is a
            preemption notice already.
        BusyError: another process trains in the run directory.
        CheckpointError: they are of another model, vocabulary or dataset, ``resume`` is off and there is one, or there
            is none in ``load_weights`` or ``load_embedding``.
        NotOursError, DataError: the run store is none, or cannot be used; or the run's directory has no place in it.
    """
    from megatron_vpmoe.training.checkpoint_files import open_checkpoint
    from megatron_vpmoe.training.run_directory import restorable

    _check_place(cfg)
    check_store(store_path(cfg.logging.run_store), cfg.run_directory)
    if cfg.failure.preemption_file is not None:
        PreemptionFile(Path(cfg.failure.preemption_file)).refuse_early()
    check_free(cfg.run_directory / LOCK, f"the run directory {cfg.run_directory}")
    found, _, _ = restorable(cfg, check_hashes=False)
    for path in (cfg.checkpoint.load_weights, cfg.checkpoint.load_embedding):
        if found is None and path is not None:
            open_checkpoint(Path(path), check_hashes=False)


def _check_place(cfg: RunConfig) -> None:
    place, fault = place_of(cfg.run_directory)
    reason = fault and f"{place} {fault}"
    if reason is None:
        needed, free = 4 * sum(parameter_sizes(cfg).values()), shutil.disk_usage(place).free
        if free < needed:
            reason = f"one checkpoint takes more than {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free"
    if reason is not None:
        raise ConfigError(
            f"the run cannot be kept there: {reason}",
            source=f"the run directory {cfg.run_directory}",
            remedy="name another place by --run-dir, or make it a folder with room that this user may write to",
        )
