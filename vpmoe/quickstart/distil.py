"""``vpmoe distil-nano``: what a teacher makes of a student, beside what the same texts make of it alone.

A dense teacher masters questions from texts with mistakes. Students of one architecture, from the same weights, then
take the same tokens of the same texts: by cross-entropy alone, by the teacher's stored top K, by its live top K. The
stored one goes on on-policy, and others where the settings say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe.commands import Command
from vpmoe.quickstart.proof import QuestionProof
from vpmoe.quickstart.run import verdict
from vpmoe.quickstart.runner import Runner, say
from vpmoe.quickstart.settings import DistilSettings
from vpmoe.quickstart.trained import Files, QuestionedRun, flags, making
from vpmoe.steps import Step

NAME = "distil_nano"
DOES = {
    "teacher": "trains a dense teacher until it masters the questions, and evaluates it",
    "store": "has it say its likeliest next tokens at every supervised position",
    "start": "trains the weights that all students begin with",
    "ce": "a student goes on with the texts alone (cross-entropy)",
    "stored_topk": "a student goes on with the stored top K",
    "live_topk": "a student goes on with the teacher in memory",
    "on_policy": "goes on with its own answers, which the teacher scores",
}
AFTER = {"ce": "on_policy_after_ce", "stored_topk": "on_policy", "live_topk": "on_policy_after_live"}
"""Students of stored conversations, and what each becomes on-policy."""


@dataclass(frozen=True)
class Teaching:
    """The teacher, which all seeds share."""

    run: QuestionedRun
    store: Path
    proof: QuestionProof[DistilSettings]

    @classmethod
    def of(cls, proof: QuestionProof[DistilSettings]) -> Teaching:
        """Of the configuration's seed."""
        data = proof.data
        run = proof.run("teacher", data.cfg.training.seed, proof.settings.teacher, "--data-path", str(data.dataset))
        return cls(run, data.data / "store", proof)

    def scoring(self) -> tuple[Step, Command]:
        """The command that makes the store; the step is its own."""
        data, options = self.proof.data, {"teacher": str(self.run.run), **self.proof.settings.store}
        words = ("data", "score", str(data.dataset), *flags(options))
        return making(data.work, "annotated_dataset", words, self.store, overwrite=data.overwrite)


@dataclass(frozen=True)
class Students:
    """Those of one seed.

    Attributes:
        start: the run whose weights they begin with.
        runs: by name: those of ``AFTER``, and what they become.
        after: which of them go on on-policy.
    """

    seed: int
    start: QuestionedRun
    runs: Mapping[str, QuestionedRun]
    after: tuple[str, ...]

    @classmethod
    def of(cls, teaching: Teaching, seed: int) -> Students:
        """All of them."""
        proof = teaching.proof
        settings, plain = proof.settings, ("--data-path", str(proof.data.dataset))
        stored, live = ("--data-path", str(teaching.store)), ("--teacher-weights", str(teaching.run.run))
        start = proof.run("start", seed, settings.start, *plain)
        begin = ("--load-weights", str(start.run))
        runs = {
            "ce": proof.run("ce", seed, settings.stage2, *begin, *stored, kd_alpha=0.0),
            "stored_topk": proof.run("stored_topk", seed, settings.stage2, *begin, *stored),
            "live_topk": proof.run("live_topk", seed, settings.stage2, *begin, *plain, *live),
        }
        after = ("stored_topk", *settings.after)
        for before in after:
            own = ("--load-weights", str(runs[before].run), "--rollout-seed", str(seed))
            runs[AFTER[before]] = proof.run(AFTER[before], seed, settings.stage3, *plain, *live, *own)
        return cls(seed, start, runs, after)


def plan_of(root: Path, **wishes: Any) -> QuestionProof[DistilSettings]:
    """What the command line asks for; see ``QuestionProof.of``."""
    return QuestionProof.of(root, NAME, DistilSettings, DOES, **wishes)


def run_distil_nano(proof: QuestionProof[DistilSettings]) -> int:
    """Do the steps, and those after the store for each seed; returns 0, or 1 below a target that binds.

    Raises:
        VpmoeError: whatever stops a step; its ``exit_code`` is that of the command that failed or of the signal.
    """
    from vpmoe.quickstart.distil_report import write_distil_report

    teaching = Teaching.of(proof)
    classes = [Students.of(teaching, seed) for seed in proof.seeds]
    runner = proof.begin()
    runner.announce("teacher")
    taught = runner.train("teacher", teaching.run)
    runner.evaluate("teacher", teaching.run.evaluating(taught))
    runner.announce("store")
    runner.keyed("store", *teaching.scoring())
    for students in classes:
        say(f"\nseed {students.seed}")
        _train(students, teaching.run, taught, runner)
    report = write_distil_report(teaching, classes, runner.seconds)
    return verdict(report["targets"], proof.exempt)


def _train(students: Students, teacher: QuestionedRun, taught: Files, runner: Runner) -> None:
    # Of a live teacher the weights decide as much as those that a student begins with.
    asked = {f"teacher/{name}": entry for name, entry in taught.items()}
    runner.announce("start")
    files = {"start": runner.train("start", students.start)}

    def trained(step: str, name: str, before: str, more: Files) -> None:
        run = students.runs[name]
        files[name] = runner.train(step, run, {**files[before], **more})
        runner.evaluate(step, run.evaluating(files[name], (teacher, taught)))

    for name in AFTER:
        runner.announce(name)
        trained(name, name, "start", asked if name == "live_topk" else {})
    runner.announce("on_policy")
    for before in students.after:
        trained("on_policy", AFTER[before], before, asked)
