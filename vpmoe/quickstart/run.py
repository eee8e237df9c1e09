"""The five steps of the quickstart, one after the other: what is done and valid is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpmoe.quickstart.plan import Plan
from vpmoe.quickstart.runner import PREPARING, Runner, say

_DOES = {
    **PREPARING,
    "train": "trains the nano vpMoE with the full stack",
    "evaluate": "measures losses on valid, and validity and exactness of answers to held-out questions",
}

MISSED = 1
"""Exit code: everything ran, but the result is below a target."""


def run_quickstart(plan: Plan) -> int:
    """Do the five steps; returns 0, or 1 if the result is below a target that binds.

    Raises:
        VpmoeError: whatever stops a step; its ``exit_code`` is that of the command that failed or of the signal.
    """
    runner = Runner(_DOES, plan.work, force=plan.force, overwrite=plan.overwrite)
    say(f"vpMoE quickstart in {plan.work}: {len(_DOES)} steps; what is done and valid is skipped")
    runner.look(plan.root)
    runner.prepare(plan)
    runner.announce("train")
    trained = runner.train("train", plan)
    runner.announce("evaluate")
    runner.evaluate("evaluate", plan.evaluating(trained))
    return _conclude(plan, runner.seconds)


def _conclude(plan: Plan, seconds: dict[str, float]) -> int:
    from rich.console import Console

    from vpmoe.quickstart.report import print_summary, write_quickstart_report

    report = write_quickstart_report(plan, seconds)
    print_summary(report, plan.report_folder, plan.settings.evaluation.shown_samples, Console())
    return verdict(report["targets"], plan.exempt)


def verdict(targets: Mapping[str, Any], exempt: str | None) -> int:
    """Say how a result stands to its targets; the exit code.

    Args:
        targets: as a report has them.
        exempt: why they do not bind; None: they do.
    """
    from vpmoe.quickstart.report import missed_line

    if targets["met"]:
        say("targets met")
        return 0
    if exempt:
        say(f"below the targets, which do not bind with {exempt}: {missed_line(targets)}")
        return 0
    say(f"TARGET MISSED: {missed_line(targets)}")
    return MISSED
