"""Running jobs: inputs checked, weights streamed to disk, exported, verified; a keyed step an object."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_vpmoe.config import RunConfig
from vpmoe import steps
from vpmoe.errors import UpcycleError
from vpmoe.hf.convert import write_hf_directory
from vpmoe.toml_file import validated
from vpmoe.upcycle.inputs import MEGATRON, Input, checkpoint_of, open_input
from vpmoe.upcycle.job import Job, JobSettings, Task, job_of
from vpmoe.upcycle.ladder_file import Ladder, ObjectSpec, geometry
from vpmoe.weights import megatron_checkpoint, weights_sha256
from vpmoe.weights.geometry import conform, geometry_of
from vpmoe.weights.progress import TensorProgress
from vpmoe.weights.tensors import DTYPES

KIND = "object"
VERSION = 1
"""Of what this module does to every object: writing, export, receipt."""


@dataclass(frozen=True)
class Planned:
    """A job ready to run: everything that decides its output is known."""

    spec: ObjectSpec
    cfg: RunConfig
    job: Job
    settings: JobSettings
    inputs: dict[str, Input]

    @cached_property
    def step(self) -> steps.Step:
        """The keyed step that makes the object."""
        return steps.Step(
            kind=KIND,
            version=VERSION,
            output=Path(self.spec.path),
            decides={
                "object": self.spec.id,
                "job": {"name": self.job.name, "version": self.job.version},
                **self.job.decides(self.spec, self.settings),
                "inputs": {role: item.identity for role, item in self.inputs.items()},
                "geometry": geometry_of(self.cfg),
            },
            packages=self.job.packages,
            inputs=tuple(Path(item.spec.path) for item in self.inputs.values()),
        )


def plan(ladder: Ladder, identifier: str, *, check_hashes: bool = True) -> Planned:
    """Read an object's entry and check its inputs.

    Raises:
        UpcycleError: the object is a source, its entry is wrong, or an input is missing, altered or out of date.
    """
    spec = ladder.get(identifier)
    job, settings = job_and_settings(ladder, spec)
    cfg = geometry(spec)
    assert cfg is not None
    inputs = {role: open_input(ladder.get(name), check_hashes=check_hashes) for role, name in spec.inputs.items()}
    planned = Planned(spec, cfg, job, settings, inputs)
    assert planned.step.key  # what is wrong with a file that the settings name is said now
    return planned


def job_and_settings(ladder: Ladder, spec: ObjectSpec) -> tuple[Job, JobSettings]:
    """The job that makes an object, and its settings.

    Raises:
        UpcycleError: there is no such job, or its settings or roles are others.
    """
    place = f"{ladder.path}, objects.{spec.id}"
    if spec.job is None:
        raise UpcycleError(
            f"{spec.id} is a source, no job makes it",
            source=place,
            remedy=f"put it at {spec.path}" + (f"; it is published as {spec.origin}" if spec.origin else ""),
        )
    job = job_of(spec.job, source=f"{place}.job")
    if not set(job.roles) <= set(spec.inputs) <= {*job.roles, *job.optional_roles}:
        perhaps = f", and {', '.join(job.optional_roles)} if declared" if job.optional_roles else ""
        raise UpcycleError(
            f"{job.name} reads {', '.join(job.roles) or 'nothing'}{perhaps}; the object declares "
            f"{', '.join(spec.inputs) or 'nothing'}",
            source=f"{place}.inputs",
            remedy="declare exactly these roles",
        )
    remedy = f"{job.name} takes {', '.join(job.settings_type.model_fields)}"
    place = f"{place}.settings"
    return job, validated(job.settings_type, spec.settings, error=UpcycleError, source=place, remedy=remedy)


def run(
    planned: Planned, *, overwrite: bool = False, quiet: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Make an object, or find it done; returns its receipt.

    Args:
        planned: the object.
        overwrite: replace an object, or an unfinished one, that is out of date or damaged.
        quiet: no progress bars.
        say: told a line about what is found and done.

    Raises:
        NotOursError: the object exists and is out of date, or something else lies there.
        BusyError: another process is making it.
        UpcycleError: its verification fails.
    """
    return steps.run(planned.step, lambda work: _make(planned, work, quiet), overwrite=overwrite, say=say)


def _make(planned: Planned, work: steps.Work, quiet: bool) -> dict[str, Any]:
    task = Task(planned.spec, planned.cfg, planned.inputs, planned.settings, work.scratch, lambda _what, _size: None)

    def weights() -> dict[str, Any]:
        hashes = _write_weights(planned, task, work.fresh(MEGATRON), quiet)
        return {"weights_sha256": weights_sha256(hashes), "conversion": task.report}

    def export() -> None:
        with TensorProgress("export", None, quiet=quiet) as progress:
            write_hf_directory(checkpoint_of(work.folder), work.fresh("hf"), progress=progress)

    phases = {
        "weights": weights,
        "export": export,
        "verification": lambda: planned.job.verify(task, work.folder),
    }
    found = {name: work.once(name, lambda phase=phase: _timed(phase)) for name, phase in phases.items()}
    return {
        "object": planned.spec.id,
        "rung": planned.spec.rung,
        "job": planned.job.name,
        "settings": planned.settings.model_dump(mode="json"),
        "inputs": {
            role: {
                "object": item.spec.id,
                "origin": item.spec.origin,
                "revision": item.spec.revision,
                **item.identity,
                "content": item.content,
            }
            for role, item in planned.inputs.items()
        },
        "geometry_config": planned.spec.config,
        **found["weights"]["found"],
        "rows_read": found["weights"]["found"]["conversion"].get("rows_read", task.rows_read),
        "verification": found["verification"]["found"],
        "origin": megatron_checkpoint.origin_of(megatron_checkpoint.read_state(checkpoint_of(work.folder))),
        "processor_seconds": round(sum(phase["processor_seconds"] for phase in found.values()), 2),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _timed(phase: Callable[[], Any]) -> dict[str, Any]:
    before = processor_seconds()
    found = phase()
    return {"found": found, "processor_seconds": processor_seconds() - before}


def processor_seconds() -> float:
    """Of this process and its children that have ended, since it began."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(entry.ru_utime + entry.ru_stime for entry in used)


def _write_weights(planned: Planned, task: Task, directory: Path, quiet: bool) -> dict[str, str]:
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
