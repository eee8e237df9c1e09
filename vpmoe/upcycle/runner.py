"""Running jobs: inputs checked, weights streamed to disk, exported, verified; whole or not at all.

An object is made in ``<path>.partial`` and renamed when its receipt is written. A run that was interrupted goes on
after the last finished stage (checkpoint, export, verification) as long as its key is the same; one that is done and up
to date is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.files import (
    first_damage,
    json_bytes,
    list_files,
    sha256_of_file,
    sha256_of_json,
    sync,
    write_atomically,
)
from vpmoe.errors import UpcycleError
from vpmoe.hf.convert import ASSETS, export_checkpoint
from vpmoe.upcycle import receipt as receipts
from vpmoe.upcycle.job import Input, Job, JobSettings, Task
from vpmoe.upcycle.jobs import job_of
from vpmoe.upcycle.registry import ObjectSpec, Registry, describe, geometry, read_toml
from vpmoe.weights import megatron_checkpoint, weights_sha256
from vpmoe.weights.geometry import conform, geometry_of
from vpmoe.weights.progress import TensorProgress
from vpmoe.weights.safetensors_folder import INDEX, weight_files
from vpmoe.weights.tensors import DTYPES

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """A job ready to run: everything that decides its output is known and hashed in ``key``."""

    spec: ObjectSpec
    cfg: RunConfig
    job: Job
    settings: JobSettings
    inputs: dict[str, Input]
    key: str


def plan(registry: Registry, identifier: str, *, check_hashes: bool = True) -> Planned:
    """Read the job's TOML and check its inputs.

    Raises:
        UpcycleError: the object is a source, the TOML is wrong, or an input is missing, altered or out of date.
    """
    spec = registry.get(identifier)
    if spec.job is None:
        raise UpcycleError(
            f"{identifier} is a source, no job makes it",
            source=str(registry.path),
            remedy=f"put it at {spec.path}" + (f"; it is published as {spec.origin}" if spec.origin else ""),
        )
    job, settings = _read_job(spec)
    if set(job.roles) != set(spec.inputs):
        raise UpcycleError(
            f"{job.name} reads {', '.join(job.roles) or 'nothing'}; the object declares "
            f"{', '.join(spec.inputs) or 'nothing'}",
            source=f"{registry.path}, {identifier}.inputs",
            remedy="declare exactly these roles",
        )
    cfg = geometry(spec)
    assert cfg is not None
    inputs = {role: open_input(registry.get(name), check_hashes=check_hashes) for role, name in spec.inputs.items()}
    decides = {
        "object": identifier,
        "job": job.name,
        "settings": settings.model_dump(mode="json"),
        "geometry": geometry_of(cfg),
        "inputs": {role: _content_sha256(item.content) for role, item in inputs.items()},
        **job.decides(settings),
    }
    return Planned(spec, cfg, job, settings, inputs, sha256_of_json(decides))


def _read_job(spec: ObjectSpec) -> tuple[Job, JobSettings]:
    path = Path(spec.job or "")
    table = read_toml(path)
    unknown = set(table) - {"object", "job", "settings"}
    if unknown or table.get("object") != spec.id or "job" not in table:
        raise UpcycleError(
            f"not the job of {spec.id}: object is {table.get('object')!r}, unknown keys: {sorted(unknown) or 'none'}",
            source=str(path),
            remedy=f'object = "{spec.id}", job = "...", and a table [settings]',
        )
    job = job_of(table["job"], source=str(path))
    try:
        return job, job.settings_type.model_validate(table.get("settings", {}))
    except ValidationError as error:
        raise UpcycleError(
            "wrong settings:\n    " + "\n    ".join(describe(error)),
            source=f"{path}, [settings]",
            remedy=f"{job.name} takes {', '.join(job.settings_type.model_fields)}",
        ) from error


def open_input(spec: ObjectSpec, *, check_hashes: bool = True) -> Input:
    """Check an input object: it is there, unaltered, and of its declared hashes.

    Raises:
        UpcycleError: it is not.
    """
    folder = Path(spec.path)
    if spec.kind == "source":
        return Input(spec, geometry(spec), _source_content(spec, folder), None)
    if not folder.is_dir():
        raise UpcycleError(f"{spec.id} is not made yet", source=str(folder), remedy=f"vpmoe upcycle run {spec.id}")
    receipt = receipts.read_receipt(folder)
    if receipt["object"] != spec.id:
        raise UpcycleError(f"this is {receipt['object']}, not {spec.id}", source=str(folder), remedy="correct the path")
    fault = first_damage(folder, receipt["outputs"]["files"], check_hashes=check_hashes)
    cfg = geometry(spec)
    assert cfg is not None
    if fault is None and receipt["geometry"] != geometry_of(cfg):
        fault = "the receipt's geometry is not the registry's any more"
    if fault is not None:
        raise UpcycleError(f"{spec.id}: {fault}", source=str(folder), remedy=f"vpmoe upcycle run {spec.id} --force")
    return Input(spec, cfg, receipt["outputs"]["files"], receipt)


def _source_content(spec: ObjectSpec, folder: Path) -> dict[str, dict[str, Any]]:
    if not folder.is_dir():
        raise UpcycleError(
            f"{spec.id} is missing",
            source=str(folder),
            remedy="put the HF directory there" + (f"; it is published as {spec.origin}" if spec.origin else ""),
        )
    names = ["config.json", INDEX, *weight_files(folder, partial=spec.partial), *ASSETS]
    files = {name: folder / name for name in names if (folder / name).is_file()}
    content = {
        name: {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)} for name, file in sorted(files.items())
    }
    for name, expected in spec.sha256.items():
        found = content.get(name, {}).get("sha256")
        if found != expected:
            raise UpcycleError(
                f"{spec.id}: {name} has sha256 {found}, the registry says {expected}",
                source=str(folder / name),
                remedy="fetch the registered revision, or correct the registry",
            )
    return content


def _content_sha256(content: dict[str, dict[str, Any]]) -> str:
    return sha256_of_json({name: entry["sha256"] for name, entry in content.items()})


def up_to_date(planned: Planned, *, check_hashes: bool = False) -> str | None:
    """Why the object has to be made (again); None if it is done and valid."""
    folder = Path(planned.spec.path)
    if not folder.exists():
        return "not made yet"
    try:
        receipt = receipts.read_receipt(folder)
    except UpcycleError as error:
        return error.what
    if receipt["key"] != planned.key:
        return "made from other inputs, settings or geometry"
    return first_damage(folder, receipt["outputs"]["files"], check_hashes=check_hashes)


def run(planned: Planned, *, force: bool = False, quiet: bool = False, say: Say = lambda line: None) -> dict[str, Any]:
    """Make an object, or find it done; returns its receipt.

    Args:
        force: replace an object that exists and is out of date or damaged.
        quiet: no progress bars.
        say: told a line a stage.

    Raises:
        UpcycleError: the object exists and is out of date, another run is making it, or its verification fails.
    """
    folder = Path(planned.spec.path)
    reason = up_to_date(planned)
    if reason is None:
        say(f"{planned.spec.id}: done and up to date")
        return receipts.read_receipt(folder)
    if folder.exists() and not force:
        raise UpcycleError(
            f"{planned.spec.id} exists: {reason}", source=str(folder), remedy="--force makes it again and replaces it"
        )
    with _only_run(folder):
        return _make(planned, folder, quiet, say)


@contextlib.contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpcycleError(
                "another run is making this object", source=str(folder), remedy="wait for it, or end it"
            ) from None
        yield


def _make(planned: Planned, folder: Path, quiet: bool, say: Say) -> dict[str, Any]:
    started = time.monotonic()
    partial = folder.with_name(f"{folder.name}.partial")
    stages = _Stages(partial, planned.key)
    task = Task(planned.spec, planned.cfg, planned.inputs, planned.settings, partial / "scratch", _no_progress)
    checkpoint = partial / "megatron" / megatron_checkpoint.ITERATION

    with stages.stage("weights", say) as done:
        if not done:
            hashes = _write_weights(planned, task, partial / "megatron", quiet)
            stages.finish("weights", {"weights_sha256": weights_sha256(hashes), "report": task.report})
    task.report.update(stages.results["weights"]["report"])
    with stages.stage("export", say) as done:
        if not done:
            shutil.rmtree(partial / "hf", ignore_errors=True)
            with TensorProgress("export", None, quiet=quiet) as progress:
                export_checkpoint(checkpoint, partial / "hf", progress=progress)
            stages.finish("export", {})
    with stages.stage("verification", say) as done:
        if not done:
            stages.finish("verification", planned.job.verify(task, partial))
    receipt = _receipt(planned, task, stages, partial, time.monotonic() - started)
    receipts.write_receipt(partial, receipt)
    stages.clear()
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    sync(folder.parent)
    say(f"{planned.spec.id}: {folder}")
    return receipt


def _no_progress(_what: str, _size: int) -> None:
    return


def _write_weights(planned: Planned, task: Task, directory: Path, quiet: bool) -> dict[str, str]:
    task.scratch.mkdir(parents=True, exist_ok=True)
    with TensorProgress("conversion", None, quiet=quiet) as progress:
        product = planned.job.convert(replace(task, progress=progress))
    dtype = DTYPES[planned.settings.dtype]
    weights = conform(product.weights, planned.cfg, dtype, source=planned.spec.id)
    total = sum(tensor.nbytes for tensor in weights.values())
    with TensorProgress("weights", total, quiet=quiet) as progress:
        _, hashes = megatron_checkpoint.write_checkpoint(
            directory, weights, product.run_state, assets=product.assets, progress=progress
        )
    return hashes


def _receipt(planned: Planned, task: Task, stages: _Stages, partial: Path, seconds: float) -> dict[str, Any]:
    parts = sorted(path.name for path in partial.iterdir() if path.is_dir() and path != task.scratch)
    files = {f"{part}/{name}": entry for part in parts for name, entry in list_files(partial / part).items()}
    return {
        "object": planned.spec.id,
        "rung": planned.spec.rung,
        "key": planned.key,
        "job": planned.job.name,
        "settings": planned.settings.model_dump(mode="json"),
        "inputs": {
            role: {
                "object": item.spec.id,
                "origin": item.spec.origin,
                "revision": item.spec.revision,
                "content_sha256": _content_sha256(item.content),
                "files": item.content,
            }
            for role, item in planned.inputs.items()
        },
        "geometry": geometry_of(planned.cfg),
        "geometry_config": planned.spec.config,
        "outputs": {"weights_sha256": stages.results["weights"]["weights_sha256"], "files": files},
        "report": task.report,
        "verification": stages.results["verification"],
        "software": receipts.software(),
        "seconds_of_last_run": round(seconds, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


class _Stages:
    """Which stages of a partial object are finished; a partial object of another key is thrown away.

    Args:
        partial: its directory.
        key: of the run.
    """

    def __init__(self, partial: Path, key: str) -> None:
        self.path = partial / "stages.json"
        self.results: dict[str, Any] = {}
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError):
            stored = {}
        if stored.get("key") == key:
            self.results = stored["results"]
        else:
            shutil.rmtree(partial, ignore_errors=True)
        self.key = key
        self._write()

    @contextlib.contextmanager
    def stage(self, name: str, say: Say) -> Iterator[bool]:
        done = name in self.results
        say(f"{name}: done before" if done else f"{name} ...")
        yield done

    def finish(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = result
        self._write()

    def clear(self) -> None:
        """Remove what only an unfinished object has."""
        self.path.unlink()
        shutil.rmtree(self.path.parent / "scratch", ignore_errors=True)

    def _write(self) -> None:
        write_atomically(self.path, json_bytes({"key": self.key, "results": self.results}))
