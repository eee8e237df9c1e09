"""Climbing: each object made or found done, evaluated or found evaluated, and the report written anew after each.

An interrupted climb goes on where it stopped: jobs keep their own stages, and an evaluation is kept in the report's
folder as ``<object>.json`` with the key of what was evaluated.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_bytes, sha256_of_file, sha256_of_json, write_atomically
from vpmoe.errors import UpcycleError, VpmoeError
from vpmoe.ladder.evaluation import HeldOut, evaluate
from vpmoe.ladder.report import write_report
from vpmoe.ladder.settings import Ladder, read_ladder
from vpmoe.upcycle import receipt as receipts
from vpmoe.upcycle import runner
from vpmoe.upcycle.registry import ObjectSpec, Registry, load_registry
from vpmoe.weights import megatron_checkpoint

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        config: the ladder's file.
        reports: another folder of the report; None: the file's.
        first, last: rungs to climb; objects of lower ones are inputs and have to be there.
        force: make objects again that are out of date or damaged.
        quiet: no progress bars.
    """

    config: Path
    reports: Path | None = None
    first: int = 0
    last: int | None = None
    force: bool = False
    quiet: bool = False

    def folder(self) -> Path:
        """Where the report goes."""
        return self.reports or read_ladder(self.config).reports


@dataclass
class Spent:
    """Wall and processor time of a piece of work, in seconds; its child processes' included once they have ended."""

    seconds: float = 0.0
    processor_seconds: float = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Add what passes meanwhile."""
        wall, processor = time.monotonic(), _processor_time()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - wall
            self.processor_seconds += _processor_time() - processor

    def as_json(self) -> dict[str, float]:
        return {"seconds": round(self.seconds, 1), "processor_seconds": round(self.processor_seconds, 1)}


def climb(request: Request, say: Say) -> dict[str, Any]:
    """Climb the ladder; returns its report.

    Args:
        request: which one, and how far.
        say: told a line about every step.

    Raises:
        VpmoeError: whatever stops a job or an evaluation; what was done is kept.
    """
    ladder = read_ladder(request.config)
    registry, chosen = _chosen(ladder, request)
    reports = request.folder()
    held_out = HeldOut.read(ladder.evaluation)
    report: dict[str, Any] = {}
    for number, spec in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] rung {spec.rung}: {spec.id}")
        _step(registry, spec, ladder, held_out, reports, request, say)
        report = write_report(ladder, _records(registry, ladder, held_out, reports), reports, source=request.config)
    return report


def listing(request: Request) -> list[str]:
    """What a climb would do, a line an object; nothing is made."""
    ladder = read_ladder(request.config)
    registry, chosen = _chosen(ladder, request)
    held_out = HeldOut.read(ladder.evaluation)
    reports = request.folder()
    lines = []
    for spec in chosen:
        try:
            due = runner.up_to_date(runner.plan(registry, spec.id, check_hashes=False))
        except VpmoeError as error:
            due = error.what
        state = "done and up to date" if due is None else f"to be made: {due}"
        if spec.rung:
            current = due is None and _kept(reports, spec, _key(receipts.read_receipt(Path(spec.path)), held_out))
            state += "; evaluated" if current else "; to be evaluated"
        lines.append(f"rung {spec.rung}  {spec.id:<28}{state}")
    return lines


def _chosen(ladder: Ladder, request: Request) -> tuple[Registry, list[ObjectSpec]]:
    registry = load_registry(ladder.objects)
    last = max(spec.rung for spec in registry.objects.values()) if request.last is None else request.last
    chosen = [spec for spec in registry.chain(ladder.target) if request.first <= spec.rung <= last]
    if not chosen:
        raise UpcycleError(
            f"no object of rungs {request.first} to {last}",
            source=str(ladder.objects),
            remedy="vpmoe ladder --dry-run lists them",
        )
    return registry, chosen


def _step(
    registry: Registry, spec: ObjectSpec, ladder: Ladder, held_out: HeldOut, reports: Path, request: Request, say: Say
) -> None:
    """Make and evaluate one object; its record is in the report's folder afterwards."""
    job = Spent()
    with job.measuring():
        planned = runner.plan(registry, spec.id)
        done_before = runner.up_to_date(planned) is None
        receipt = runner.run(planned, force=request.force, quiet=request.quiet, say=lambda line: say(f"  {line}"))
    key = _key(receipt, held_out)
    kept = _kept(reports, spec, key)
    if kept is not None and done_before:
        say("  evaluation: done before")
        return
    record: dict[str, Any] = {
        "object": spec.id,
        "rung": spec.rung,
        "key": key,
        "made": receipt["key"],
        "job_time": _time_before(reports, spec, receipt["key"]) if done_before else job.as_json(),
    }
    if spec.rung:  # what only feeds the ladder is no rung of it
        evaluation = Spent()
        with evaluation.measuring():
            folder = Path(spec.path)
            checkpoint = folder / "megatron" / megatron_checkpoint.ITERATION
            record["evaluation"] = evaluate(
                checkpoint, folder / "hf", held_out, ladder.evaluation, progress=lambda line: say(f"  {line}")
            )
        record["evaluation_time"] = evaluation.as_json()
    write_atomically(_record_path(reports, spec), json_bytes(record))


def _key(receipt: dict[str, Any], held_out: HeldOut) -> str:
    """Of what was evaluated: weights, vocabulary, texts, questions, and how."""
    vocabulary = {
        name: entry["sha256"]
        for name, entry in receipt["outputs"]["files"].items()
        if name.startswith("hf/") and ".safetensors" not in name
    }
    decides = {"weights": receipt["outputs"]["weights_sha256"], "hf": vocabulary, "held_out": held_out.sha256}
    return sha256_of_json(decides)


def _record_path(reports: Path, spec: ObjectSpec) -> Path:
    return reports / f"{spec.id}.json"


def _record(reports: Path, spec: ObjectSpec) -> dict[str, Any]:
    """What is on record of an object; empty where nothing is, or nothing readable."""
    try:
        return json.loads(_record_path(reports, spec).read_bytes())
    except (OSError, ValueError):
        return {}


def _kept(reports: Path, spec: ObjectSpec, key: str) -> dict[str, Any] | None:
    """The record of an object, if it is of this key."""
    record = _record(reports, spec)
    return record if record.get("key") == key else None


def _time_before(reports: Path, spec: ObjectSpec, made: str) -> dict[str, float] | None:
    """What the job took, if a record of the same object tells it."""
    record = _record(reports, spec)
    return record["job_time"] if record.get("made") == made else None


def _records(registry: Registry, ladder: Ladder, held_out: HeldOut, reports: Path) -> list[dict[str, Any]]:
    """Every record that still tells of its object, in the order of making, with figures of the object's receipt."""
    found = []
    for spec in registry.chain(ladder.target):
        folder = Path(spec.path)
        if not (folder / receipts.NAME).is_file():
            continue
        receipt = receipts.read_receipt(folder)
        record = _kept(reports, spec, _key(receipt, held_out))
        if record is None:
            continue
        found.append(
            {
                **record,
                "job": receipt["job"],
                "input": receipt["inputs"].get("model", {}).get("object"),
                "weights_sha256": receipt["outputs"]["weights_sha256"],
                "receipt_sha256": sha256_of_file(folder / receipts.NAME),
                "training": receipt.get("report", {}).get("training"),
                "validation": receipt["verification"].get("validation"),
            }
        )
    return found


def _processor_time() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(entry.ru_utime + entry.ru_stime for entry in used)
