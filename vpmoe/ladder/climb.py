"""Climbing: each object made or found done, evaluated or found evaluated, and the report written anew after each.

An evaluation is a keyed step of its own: ``<reports>/<object>/receipt.json`` has what was asked and what was found; so
is each suite, which leaves its report in ``<reports>/eval/<suite>/<object>/``. An interrupted climb goes on where it
stopped.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import sha256_of_file
from vpmoe import steps
from vpmoe.commands import Command, run_command
from vpmoe.errors import NotOursError, UpcycleError, VpmoeError
from vpmoe.eval.reports import check_reportable
from vpmoe.ladder import report
from vpmoe.ladder.evaluation import HeldOut, evaluate
from vpmoe.ladder.suites import RungSuite, check_suites, pinned_changes, read_suites
from vpmoe.upcycle import runner
from vpmoe.upcycle.inputs import identity_of
from vpmoe.upcycle.ladder_file import Evaluation, Ladder, ObjectSpec, geometry, read_ladder

Say = Callable[[str], None]
KIND, SUITE_KIND = "evaluation", "evaluation_suite"
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
    say: Say | None

    @classmethod
    def of(cls, request: Request, ladder: Ladder, say: Say | None) -> _Climb:
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
        check_suites(ladder.evaluation, source=str(ladder.path))
        return cls(request, ladder, chain, chosen, ladder.evaluation, request.reports or ladder.reports, say)

    @cached_property
    def held_out(self) -> HeldOut:
        return HeldOut.read(self.settings)

    @cached_property
    def suites(self) -> list[RungSuite]:
        return read_suites(self.settings, self.say)

    def asks(self, spec: ObjectSpec, receipt: dict[str, Any]) -> dict[str, steps.Step]:
        """Of each suite the step that asks an object which has this receipt; the report is among its files."""
        return {
            suite.label: steps.Step(
                kind=SUITE_KIND,
                version=VERSION,
                output=self.reports / "eval" / suite.label / spec.id,
                decides={"object": spec.id, "made": identity_of(receipt), "asked": suite.decides},
                packages=_PACKAGES,
                inputs=(Path(spec.path),),
            )
            for suite in self.suites
        }

    def is_asked(self, spec: ObjectSpec, receipt: dict[str, Any]) -> bool:
        """Whether everything that the object is to be asked is known."""
        try:
            found = [self.evaluation(spec, receipt), *self.asks(spec, receipt).values()]
            return all(step.state().due is None for step in found)
        except VpmoeError:
            return False

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
    plan = _Climb.of(request, ladder, say)
    check_reportable(plan.reports / "ladder.json", report.KIND)
    for spec in plan.chosen:  # what is wrong with the last is said now, not after hours
        runner.job_and_settings(ladder, spec)
        geometry(spec)
    for line in ladder.prepare:
        command = Command(("vpmoe", *shlex.split(line)))
        say(f"$ {command}")
        run_command(command, Path.cwd(), to_stderr=True)
    _check_named(plan)
    assert plan.held_out and plan.suites is not None  # likewise
    written: dict[str, Any] = {}
    for number, spec in enumerate(plan.chosen, 1):
        say(f"[{number}/{len(plan.chosen)}] rung {spec.rung}: {spec.id}")
        _make_and_ask(plan, spec, lambda line: say(f"  {line}"))
        written = report.write_report(ladder, _records(plan), plan.reports)
    return written


def _check_named(plan: _Climb) -> None:
    """Refuse to begin where a dataset, prompts or weights are missing that settings name; raises ``UpcycleError``."""
    missing: dict[str, list[str]] = {}
    for spec in plan.chosen:
        job, settings = runner.job_and_settings(plan.ladder, spec)
        try:
            job.decides(spec, settings)
        except VpmoeError as error:
            missing.setdefault(f"{error.source}: {error.what}", []).append(f"{spec.id} (rung {spec.rung})")
    if missing:
        raise UpcycleError(
            "what objects are made with is not there:\n    "
            + "\n    ".join(f"{fault}; for {', '.join(objects)}" for fault, objects in missing.items()),
            source=str(plan.ladder.path),
            remedy="make it, as the comments of that file say, or climb less far with --to",
        )


def listing(request: Request) -> list[str]:
    """What a climb would do, a line an object; nothing is made."""
    plan = _Climb.of(request, read_ladder(request.file), None)
    lines = []
    for spec in plan.chosen:
        evaluated = False
        try:
            found = runner.plan(plan.ladder, spec.id, check_hashes=False).step.state()
            due = found.due
            if due is None and found.receipt is not None and spec.rung:
                evaluated = plan.is_asked(spec, found.receipt)
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
    for suite, step in zip(plan.suites, plan.asks(spec, receipt).values(), strict=True):
        run_suite = partial(_ask_suite, suite, spec, plan.request.quiet)
        steps.run(step, run_suite, overwrite=overwrite, say=say)


def _ask_suite(suite: RungSuite, spec: ObjectSpec, quiet: bool, work: steps.Work) -> dict[str, Any]:
    before = runner.processor_seconds()
    found = suite.ask(Path(spec.path), work.folder / f"{spec.id}.json", quiet)
    work.say(f"{suite.label}: {found['number']} {found['value']:.4f}")
    return {"suite": found, "processor_seconds": round(runner.processor_seconds() - before, 2)}


def _records(plan: _Climb) -> list[dict[str, Any]]:
    """What the receipts tell of every object that is made, and evaluated if it is a rung, in the order of making."""
    found = []
    reports: dict[tuple[str, str | None], Path] = {}
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
            "provenance": receipt.get("provenance"),
            "training": told["conversion"].get("training"),
            "validation": told["verification"].get("validation"),
        }
        if spec.rung and asked.receipt:
            record |= {"evaluation": asked.receipt["report"]["evaluation"], "evaluation_time": _time(asked.receipt)}
            states = {label: step.state() for label, step in plan.asks(spec, receipt).items()}
            record["suites"] = {}
            for label, state in states.items():
                if state.receipt is None or state.due is not None:
                    continue
                asked_of = reports[label, spec.id] = plan.reports / "eval" / label / spec.id / f"{spec.id}.json"
                pinned = pinned_changes(asked_of, reports.get((label, record["input"])))
                told = {"time": _time(state.receipt), "pinned": pinned}
                record["suites"][label] = {**state.receipt["report"]["suite"], **told}
        found.append(record)
    return found


def _time(receipt: dict[str, Any]) -> dict[str, float]:
    return {"seconds": receipt["seconds"], "processor_seconds": receipt["report"]["processor_seconds"]}
