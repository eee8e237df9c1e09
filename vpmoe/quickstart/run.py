"""The five steps of the quickstart, one after the other: what is done and valid is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vpmoe.quickstart.environment import describe, differing_packages
from vpmoe.quickstart.errors import QuickstartError
from vpmoe.quickstart.jobs import Job, run_job, state_of
from vpmoe.quickstart.plan import STEPS, Plan
from vpmoe.quickstart.settings import Settings, read_settings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Path("configs/nano/quickstart.toml")

_DOES = {
    "environment": "looks at the installed packages",
    "tokenizer": "puts the o200k rank file in place, hash-checked, offline",
    "data": "makes rows, Harmony conversations of them, and token files with a compact vocabulary",
    "train": "trains the nano vpMoE with the full stack",
    "evaluate": "measures losses on valid, and validity and exactness of answers to held-out questions",
}

MISSED = 1
"""Exit code: everything ran, but the result is below a target."""


@dataclass(frozen=True)
class Request:
    """What the command line asked for; None is the default of settings and configuration.

    Attributes:
        seed: of the model and of the data order.
        run_name: of the run; with a seed and no name, the settings' name and the seed.
        train_iters: another length of training.
        force: steps to do again even if they are done.
        work_dir: data/, runs/ and reports/ go here.
        settings: another settings file.
    """

    seed: int | None = None
    run_name: str | None = None
    train_iters: int | None = None
    force: tuple[str, ...] = ()
    work_dir: Path | None = None
    settings: Path | None = None

    def plan(self, root: Path) -> Plan:
        """What this request means in the checkout ``root``.

        Raises:
            QuickstartError: an unknown step to force, or unusable settings.
            ConfigError: a training configuration that cannot be.
        """
        if unknown := [step for step in self.force if step not in STEPS[1:]]:
            raise QuickstartError(
                f"there is no step {', '.join(unknown)}", source="--force", remedy=f"use one of {', '.join(STEPS[1:])}"
            )
        settings = read_settings(self.settings or root / SETTINGS)
        run_name = self.run_name or self._default_run_name(settings)
        work = (self.work_dir or root).resolve()
        reports = work / "reports" / "quickstart"
        if run_name != settings.training.run_name:
            reports /= run_name
        return Plan(root, work, settings, self._overrides(), run_name, reports)

    def why_not_held(self) -> str | None:
        """Why the targets do not bind: another length of training or other settings than the default ones."""
        if self.train_iters is not None:
            return f"--train-iters {self.train_iters}"
        return None if self.settings is None else f"--settings {self.settings}"

    def _default_run_name(self, settings: Settings) -> str:
        name = settings.training.run_name
        return name if self.seed is None else f"{name}_seed{self.seed}"

    def _overrides(self) -> tuple[str, ...]:
        words: list[str] = []
        if self.seed is not None:
            words += ["--seed", str(self.seed), "--data-seed", str(self.seed)]
        if self.train_iters is not None:
            words += ["--train-iters", str(self.train_iters)]
        return tuple(words)


def say(line: str) -> None:
    """Print at once: what commands print comes between."""
    print(line, flush=True)


def run_quickstart(request: Request, root: Path = ROOT) -> int:
    """Do the five steps; returns 0, or 1 if the result is below a target that binds.

    Raises:
        VpmoeError: whatever stops a step; its ``exit_code`` is that of the command that failed or of the signal.
    """
    plan = request.plan(root)
    plan.work.mkdir(parents=True, exist_ok=True)
    say(f"vpMoE quickstart in {plan.work}: {len(STEPS)} steps; what is done and valid is skipped")
    _announce("environment")
    _look_around(root)
    seconds: dict[str, float] = {}
    jobs = plan.jobs()
    for step in STEPS[1:]:
        _announce(step)
        for job in (job for job in jobs if job.step == step):
            seconds[job.name] = do(job, plan.work, force=step in request.force, say=say)
    return _conclude(plan, request, seconds)


def do(job: Job, folder: Path, *, force: bool, say: Callable[[str], None]) -> float:
    """Run a job unless it is done and valid, and say which and how long; returns the seconds spent on it in all."""
    state = state_of(job, force=force)
    if state.done:
        say(f"  {job.name}: {state.reason}, skipped (it took {state.seconds:.1f} s)")
        return state.seconds
    say(f"  {job.name}: {state.reason}")
    seconds = run_job(job, state, folder, say=lambda line: say(f"  {line}"))
    say(f"  {job.name}: done in {seconds:.1f} s")
    return seconds


def _announce(step: str) -> None:
    say(f"\n[{STEPS.index(step) + 1}/{len(STEPS)}] {step}: {_DOES[step]}")


def _look_around(root: Path) -> None:
    started = time.perf_counter()
    here = describe()
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    say(f"  Python {here['python']}, {packages}, {here['cores']} cores")
    for line in differing_packages(root / "requirements" / "lock.txt"):
        say(f"  not as pinned: {line}")
    say(f"  done in {time.perf_counter() - started:.1f} s")


def _conclude(plan: Plan, request: Request, seconds: dict[str, float]) -> int:
    from rich.console import Console

    from vpmoe.quickstart.report import missed_line, print_summary, write_quickstart_report

    report = write_quickstart_report(plan, seconds)
    print_summary(report, plan.report_folder, plan.settings.evaluation.shown_samples, Console())
    if report["targets"]["met"]:
        say("targets met")
        return 0
    if exempt := request.why_not_held():
        say(f"below the targets, which do not bind with {exempt}: {missed_line(report['targets'])}")
        return 0
    say(f"TARGET MISSED: {missed_line(report['targets'])}")
    return MISSED
