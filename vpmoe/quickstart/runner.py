"""Steps one after the other, by commands: what is done and valid is skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpmoe import steps
from vpmoe.commands import Command, run_command
from vpmoe.quickstart.environment import described, differing_packages
from vpmoe.quickstart.plan import Plan
from vpmoe.quickstart.trained import EVALUATION, Files, TrainedRun

PREPARING = {
    "environment": "looks at the installed packages",
    "tokenizer": "puts the o200k rank file in place, hash-checked, offline",
    "data": "makes rows, Harmony conversations of them, and token files with a compact vocabulary",
}


def say(line: str) -> None:
    """Print at once: what commands print comes between."""
    print(line, flush=True)


def say_below(line: str) -> None:
    """The same, of the step that was announced."""
    say(f"  {line}")


class Runner:
    """Does steps in ``work``.

    Args:
        does: what each step does, by its name, in their order.
        work: where the commands run; made if absent.
        force: steps to do again even if they are done.
        overwrite: replace what was made of other settings, code or data.

    Attributes:
        seconds: spent on what was made, by name.
    """

    def __init__(self, does: Mapping[str, str], work: Path, *, force: Sequence[str], overwrite: bool) -> None:
        self._does, self._work, self._force, self._overwrite = dict(does), work, force, overwrite
        self.seconds: dict[str, float] = {}
        work.mkdir(parents=True, exist_ok=True)

    def announce(self, step: str) -> None:
        """Say which step begins."""
        say(f"\n[{list(self._does).index(step) + 1}/{len(self._does)}] {step}: {self._does[step]}")

    def command(self, command: Command) -> None:
        """Say it and run it."""
        say_below(f"$ {command}")
        run_command(command, self._work)

    def keyed(self, name: str, step: steps.Step, command: Command) -> dict[str, Any]:
        """A command that finds by itself what of ``step`` is done; returns the receipt."""
        if name in self._force:
            steps.discard(step, say=say_below)
        self.command(command)  # finds by itself what is done of it
        receipt = steps.read_receipt(step.output)
        self._count(step.kind, receipt)
        return receipt

    def look(self, root: Path) -> None:
        """Environment."""
        self.announce("environment")
        say_below(described())
        for line in differing_packages(root / "requirements" / "lock.txt"):
            say_below(f"not as pinned: {line}")

    def prepare(self, *plans: Plan) -> None:
        """Tokenizer and datasets."""
        self.announce("tokenizer")
        self.command(Command(("vpmoe", "tokenizer", "install")))
        self.announce("data")
        for plan in plans:
            for step, command in plan.preparing():
                self.keyed("data", step, command)

    def train(self, name: str, run: TrainedRun, start: Files | None = None) -> dict[str, Any]:
        """A run, from the weights of the run with files ``start``; returns its files."""
        step, command = run.training(start)

        def make(_work: steps.Work) -> dict[str, Any]:
            self.command(command)
            return {"files": run.trained_files()}

        receipt = self._run(name, step, make)
        self._count("training" if name == "train" else name, receipt)
        return receipt["files"]

    def evaluate(self, name: str, asked: tuple[steps.Step, Command]) -> None:
        """An evaluation of a run: the step, and its command but for its output."""
        step, command = asked

        def written(folder: Path) -> Command:
            return Command((*command.words, "--output", os.path.relpath(folder / EVALUATION, self._work)))

        self.folder(name, step, written, "evaluation")

    def folder(
        self, name: str, step: steps.Step, command: Callable[[Path], Command], counted: str | None = None
    ) -> None:
        """A step that a command makes into a folder that it is told; its seconds are ``counted`` as those of a name."""

        def make(work: steps.Work) -> dict[str, Any]:
            self.command(command(work.folder))
            return {}

        self._count(counted or name, self._run(name, step, make))

    def _run(self, name: str, step: steps.Step, make: Callable[[steps.Work], dict[str, Any]]) -> dict[str, Any]:
        if name in self._force:
            steps.discard(step, say=say_below)
        return steps.run(step, make, overwrite=self._overwrite, check_hashes=True, say=say_below)

    def _count(self, name: str, receipt: Mapping[str, Any]) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + float(receipt["seconds"])
