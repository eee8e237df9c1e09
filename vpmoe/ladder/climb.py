"""Climbing: each object made or found done, evaluated or found evaluated, and the report written anew after each.

An evaluation is a keyed step of its own: ``<reports>/<object>/receipt.json`` has what was asked and what was found. An
interrupted climb goes on where it stopped.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import sha256_of_file
from vpmoe import steps
from vpmoe.commands import Command, run_command
from vpmoe.errors import NotOursError, UpcycleError, VpmoeError
from vpmoe.eval.reports import check_reportable
from vpmoe.ladder import report
from vpmoe.ladder.evaluation import HeldOut, evaluate
from vpmoe.upcycle import runner
from vpmoe.upcycle.inputs import identity_of
from vpmoe.upcycle.ladder_file import Evaluation, Ladder, ObjectSpec, geometry, read_ladder

Say = Callable[[str], None]
KIND = "evaluation"
VERSION = 1
"""Of how an object is asked."""
_PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers")


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        file: the ladder's.
        reports: another folder of the report; None: the file's.
        first, last: rungs to climb; objects of lower ones are inputs and have to be there.
        overwrite: make objects and evaluations again that are out of date or damaged.
        quiet: no progress bars.
    """

    file: Path
    reports: Path | None = None
    first: int = 0
    last: int | None = None
    overwrite: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class _Climb:
    """A request, and what it leads to."""

    request: Request
    ladder: Ladder
    chain: list[ObjectSpec]
    chosen: list[ObjectSpec]
    settings: Evaluation
    reports: Path

    @classmethod
    def of(cls, request: Request, ladder: Ladder) -> _Climb:
        if ladder.target is None or ladder.evaluation is None:
            raise UpcycleError(
                "a climb needs a target and an [evaluation]",
                source=str(ladder.path),
                remedy="add them, or make single objects with vpmoe upcycle run",
            )
        chain = ladder.chain(ladder.target)
        last = max(spec.rung for spec in chain) if request.last is None else request.last
        chosen = [spec for spec in chain if request.first <= spec.rung <= last]
        if not chosen:
            raise UpcycleError(
                f"no object of rungs {request.first} to {last}",
                source=str(ladder.path),
                remedy="vpmoe ladder --dry-run lists them",
            )
        return cls(request, ladder, chain, chosen, ladder.evaluation, request.reports or ladder.reports)

    @cached_property
    def held_out(self) -> HeldOut:
        return HeldOut.read(self.settings)

    def evaluation(self, spec: ObjectSpec, receipt: dict[str, Any]) -> steps.Step:
        """The step that evaluates an object which has this receipt."""
        return steps.Step(
            kind=KIND,
            version=VERSION,
            output=self.reports / spec.id,
            decides={"object": spec.id, "made": identity_of(receipt), "asked": self.held_out.decides},
            packages=_PACKAGES,
            inputs=(Path(spec.path),),
        )


def climb(request: Request, say: Say) -> dict[str, Any]:
    """Climb the ladder; returns its report.

    Args:
        request: which one, and how far.
        say: told a line about every step.

    Raises:
        VpmoeError: whatever stops a command, a job or an evaluation; what was done is kept.
    """
    ladder = read_ladder(request.file)
    plan = _Climb.of(request, ladder)
    check_reportable(plan.reports / "ladder.json", report.KIND)
    for spec in plan.chosen:  # what is wrong with the last is said now, not after hours
        runner.job_and_settings(ladder, spec)
        geometry(spec)
    for line in ladder.prepare:
        command = Command(("vpmoe", *shlex.split(line)))
        say(f"$ {command}")
        run_command(command, Path.cwd(), to_stderr=True)
    assert plan.held_out  # likewise
    written: dict[str, Any] = {}
    for number, spec in enumerate(plan.chosen, 1):
        say(f"[{number}/{len(plan.chosen)}] rung {spec.rung}: {spec.id}")
        _make_and_ask(plan, spec, lambda line: say(f"  {line}"))
        written = report.write_report(ladder, _records(plan), plan.reports)
    return written


def listing(request: Request) -> list[str]:
    """What a climb would do, a line an object; nothing is made."""
    plan = _Climb.of(request, read_ladder(request.file))
    lines = []
    for spec in plan.chosen:
        evaluated = False
        try:
            found = runner.plan(plan.ladder, spec.id, check_hashes=False).step.state()
            due = found.due
            if due is None and found.receipt is not None and spec.rung:
                evaluated = plan.evaluation(spec, found.receipt).state().due is None
        except VpmoeError as error:
            due = error.what
        state = "done and up to date" if due is None else f"to be made: {due}"
        if spec.rung:
            state += "; evaluated" if evaluated else "; to be evaluated"
        lines.append(f"rung {spec.rung}  {spec.id:<28}{state}")
    return lines


def _make_and_ask(plan: _Climb, spec: ObjectSpec, say: Say) -> None:
    overwrite = plan.request.overwrite
    planned = runner.plan(plan.ladder, spec.id)
    receipt = runner.run(planned, overwrite=overwrite, quiet=plan.request.quiet, say=say)
    if not spec.rung:  # what only feeds the ladder is no rung of it
        return

    def ask(_work: steps.Work) -> dict[str, Any]:
        before = runner.processor_seconds()
        found = evaluate(Path(spec.path), plan.held_out, plan.settings, progress=say)
        return {"evaluation": found, "processor_seconds": round(runner.processor_seconds() - before, 2)}

    steps.run(plan.evaluation(spec, receipt), ask, overwrite=overwrite, say=say)


def _records(plan: _Climb) -> list[dict[str, Any]]:
    """What the receipts tell of every object that is made, and evaluated if it is a rung, in the order of making."""
    found = []
    for spec in plan.chain:
        try:
            receipt = steps.read_receipt(Path(spec.path))
            asked = plan.evaluation(spec, receipt).state()
        except NotOursError:
            continue
        if spec.rung and asked.due is not None:
            continue
        told = receipt["report"]
        record = {
            "object": spec.id,
            "rung": spec.rung,
            "job": told["job"],
            "job_time": _time(receipt),
            "input": told["inputs"].get("model", {}).get("object"),
            "weights_sha256": told["weights_sha256"],
            "receipt_sha256": sha256_of_file(Path(spec.path) / steps.RECEIPT),
            "training": told["conversion"].get("training"),
            "validation": told["verification"].get("validation"),
        }
        if spec.rung and asked.receipt:
            record |= {"evaluation": asked.receipt["report"]["evaluation"], "evaluation_time": _time(asked.receipt)}
        found.append(record)
    return found


def _time(receipt: dict[str, Any]) -> dict[str, float]:
    return {"seconds": receipt["seconds"], "processor_seconds": receipt["report"]["processor_seconds"]}
