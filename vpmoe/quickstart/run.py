"""The five steps of the quickstart, one after the other: what is done and valid is skipped."""

from __future__ import annotations

import os
from typing import Any

from vpmoe import steps
from vpmoe.commands import Command, run_command
from vpmoe.quickstart.environment import describe, differing_packages
from vpmoe.quickstart.plan import STEPS, Plan

_DOES = {
    "environment": "looks at the installed packages",
    "tokenizer": "puts the o200k rank file in place, hash-checked, offline",
    "data": "makes rows, Harmony conversations of them, and token files with a compact vocabulary",
    "train": "trains the nano vpMoE with the full stack",
    "evaluate": "measures losses on valid, and validity and exactness of answers to held-out questions",
}

MISSED = 1
"""Exit code: everything ran, but the result is below a target."""


def say(line: str) -> None:
    """Print at once: what commands print comes between."""
    print(line, flush=True)


def run_quickstart(plan: Plan) -> int:
    """Do the five steps; returns 0, or 1 if the result is below a target that binds.

    Raises:
        VpmoeError: whatever stops a step; its ``exit_code`` is that of the command that failed or of the signal.
    """
    plan.work.mkdir(parents=True, exist_ok=True)
    say(f"vpMoE quickstart in {plan.work}: {len(STEPS)} steps; what is done and valid is skipped")
    _announce("environment")
    here = describe()
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    say(f"  Python {here['python']}, {packages}, {here['cores']} cores")
    for line in differing_packages(plan.root / "requirements" / "lock.txt"):
        say(f"  not as pinned: {line}")
    _announce("tokenizer")
    _run(Command(("vpmoe", "tokenizer", "install")), plan)
    _announce("data")
    seconds: dict[str, float] = {}
    for step, command in plan.data():
        if "data" in plan.force:
            steps.discard(step, say=_say_below)
        _run(command, plan)  # finds by itself what is done of it
        seconds[step.kind] = float(steps.read_receipt(step.output)["seconds"])
    _announce("train")
    trained = _train(plan)
    _announce("evaluate")
    seconds |= {"training": trained["seconds"], "evaluation": _evaluate(plan, trained["files"])["seconds"]}
    return _conclude(plan, seconds)


def _train(plan: Plan) -> dict[str, Any]:
    step, command = plan.training()

    def make(_work: steps.Work) -> dict[str, Any]:
        _run(command, plan)
        return {"files": plan.trained_files()}

    if "train" in plan.force:
        steps.discard(step, say=_say_below)
    return steps.run(step, make, overwrite=plan.overwrite, check_hashes=True, say=_say_below)


def _evaluate(plan: Plan, trained: dict[str, Any]) -> dict[str, Any]:
    step, command = plan.evaluating(trained)

    def make(work: steps.Work) -> dict[str, Any]:
        output = os.path.relpath(work.folder / plan.evaluation.name, plan.work)
        _run(Command((*command.words, "--output", output)), plan)
        return {}

    if "evaluate" in plan.force:
        steps.discard(step, say=_say_below)
    return steps.run(step, make, overwrite=plan.overwrite, check_hashes=True, say=_say_below)


def _run(command: Command, plan: Plan) -> None:
    _say_below(f"$ {command}")
    run_command(command, plan.work)


def _announce(step: str) -> None:
    say(f"\n[{STEPS.index(step) + 1}/{len(STEPS)}] {step}: {_DOES[step]}")


def _say_below(line: str) -> None:
    say(f"  {line}")


def _conclude(plan: Plan, seconds: dict[str, float]) -> int:
    from rich.console import Console

    from vpmoe.quickstart.report import missed_line, print_summary, write_quickstart_report

    report = write_quickstart_report(plan, seconds)
    print_summary(report, plan.report_folder, plan.settings.evaluation.shown_samples, Console())
    if report["targets"]["met"]:
        say("targets met")
        return 0
    if plan.exempt:
        say(f"below the targets, which do not bind with {plan.exempt}: {missed_line(report['targets'])}")
        return 0
    say(f"TARGET MISSED: {missed_line(report['targets'])}")
    return MISSED
