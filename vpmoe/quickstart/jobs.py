"""Jobs that know whether they are done: a record of what went in and what came out, held against what is there now."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_bytes, sha256_of_json, write_atomically
from vpmoe.commands import Command, run_command
from vpmoe.quickstart.errors import QuickstartError

Values = dict[str, Any]


class Beginning(Enum):
    """What a job finds when it has to run."""

    FRESH = "nothing of it is there"
    CONTINUE = "it was interrupted, with the same inputs"
    REPLACE = "what is there came of other inputs, is damaged, or is to be made again"


@dataclass(frozen=True)
class Job:
    """Something to be made by commands.

    Attributes:
        step: the step of the quickstart that it belongs to.
        name: what it makes, in a word or two.
        folder: where its outputs go; what is found there and is not on record is not the quickstart's, and is replaced
            only by force. None: the outputs can be made again beside anything.
        record: the job's record; lies outside ``folder`` or is kept by ``prepare``.
        inputs: everything that decides the outputs, as JSON values; called when all earlier jobs are done.
        outputs: digests of the outputs, after checking them; None if they are absent or damaged.
        commands: what makes the outputs.
        prepare: called before the commands.
        complete: whether such outputs are all that the job is to make.
    """

    step: str
    name: str
    folder: Path | None
    record: Path
    inputs: Callable[[], Values]
    outputs: Callable[[], Values | None]
    commands: Callable[[Beginning], Sequence[Command]]
    prepare: Callable[[Beginning], None] = lambda beginning: None
    complete: Callable[[Values], bool] = lambda outputs: True


@dataclass(frozen=True)
class State:
    """How a job stands.

    Attributes:
        done: nothing has to be run.
        beginning: what a run would begin with.
        reason: why it is not done, for people.
        inputs: as they are now.
        seconds: spent on it so far, interrupted attempts with these inputs included.
    """

    done: bool
    beginning: Beginning
    reason: str
    inputs: Values
    seconds: float


def state_of(job: Job, *, force: bool = False) -> State:
    """Hold the job's record against its inputs and outputs as they are now.

    Raises:
        QuickstartError: its folder holds something that the quickstart did not make, and ``force`` is off.
    """
    inputs = json.loads(json.dumps(job.inputs()))
    record = _read_record(job.record)
    empty = job.folder is not None and not _holds_anything(job.folder)
    if record is None:
        if job.folder is not None and not empty and not force:
            raise _foreign(job)
        beginning = Beginning.REPLACE if force and not empty else Beginning.FRESH
        return State(False, beginning, "not done yet", inputs, 0.0)
    again = Beginning.FRESH if empty else Beginning.REPLACE
    if force:
        return State(False, again, "to be done again", inputs, 0.0)
    outputs = job.outputs()
    recorded = record["outputs"]
    if job.folder is not None and None not in (recorded, outputs) and outputs != recorded:
        raise _foreign(job)
    if record["inputs"] != inputs:
        return State(False, again, f"changed since: {_changes(record['inputs'], inputs)}", inputs, 0.0)
    if recorded is None:
        return State(False, Beginning.CONTINUE, "it was interrupted", inputs, float(record["seconds"]))
    if outputs != recorded:
        return State(False, again, "its outputs are missing or damaged", inputs, 0.0)
    return State(True, Beginning.CONTINUE, "done and valid", inputs, float(record["seconds"]))


def run_job(job: Job, state: State, folder: Path, *, say: Callable[[str], None]) -> float:
    """Run the job's commands in ``folder`` and record what came of them; returns the seconds spent on it in all.

    Raises:
        CommandFailed, Interrupted: a command did not end well; the record says that the job has begun.
        QuickstartError: the commands ended well and the outputs are not there.
    """
    # Before anything is written: from here on the folder is known to be the quickstart's.
    _write_record(job, state.inputs, None, state.seconds)
    job.prepare(state.beginning)
    _write_record(job, state.inputs, None, state.seconds)
    started = time.perf_counter()
    spent = state.seconds
    try:
        for command in job.commands(state.beginning):
            say(f"$ {command}")
            run_command(command, folder)
    finally:
        spent += time.perf_counter() - started
        _write_record(job, state.inputs, None, spent)
    outputs = job.outputs()
    if outputs is None or not job.complete(outputs):
        raise QuickstartError(
            f"the commands of {job.name!r} ended, but its outputs are not complete",
            source=str(job.folder or job.record.parent),
            remedy=f"run the quickstart again to go on, or with --force {job.step} to make them again",
        )
    _write_record(job, state.inputs, outputs, spent)
    return spent


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def _foreign(job: Job) -> QuickstartError:
    return QuickstartError(
        f"here is something that the quickstart did not make ({job.name})",
        source=str(job.folder or job.record.parent),
        remedy=f"move it away; or replace it with --force {job.step}; or work elsewhere with --work-dir",
    )


def _changes(old: Values, new: Values) -> str:
    return ", ".join(key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key))


def _read_record(path: Path) -> Values | None:
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise QuickstartError(
            f"the record is not JSON: {error}", source=str(path), remedy="delete the folder that it stands for"
        ) from error
    if record["fingerprint"] != sha256_of_json(record["inputs"]):
        raise QuickstartError(
            "the record was edited: its fingerprint is not that of its inputs", source=str(path), remedy="delete it"
        )
    return record


def _write_record(job: Job, inputs: Values, outputs: Values | None, seconds: float) -> None:
    record = {
        "job": job.name,
        "fingerprint": sha256_of_json(inputs),
        "inputs": inputs,
        "outputs": outputs,
        "seconds": round(seconds, 2),
    }
    write_atomically(job.record, json_bytes(record))
