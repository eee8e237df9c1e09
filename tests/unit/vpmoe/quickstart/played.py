"""The quickstart's commands played by small functions that keep receipts as the real ones do, and are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.files import json_bytes, list_files
from megatron_vpmoe.software import provenance
from vpmoe import steps
from vpmoe.commands import Command
from vpmoe.quickstart.plan import Plan

METRICS = [
    {"step": 10, "tag": "throughput/tokens_per_second", "value": 100.0},
    {"step": 20, "tag": "throughput/tokens_per_second", "value": 300.0},
    {"step": 30, "tag": "throughput/tokens_per_second", "value": 200.0},
    {"step": 30, "tag": "loss/final", "value": 0.5},
]
ORDER = ["rank file", "rows", "conversations", "dataset", "training", "evaluation"]


class Killed(BaseException):
    """Ends the quickstart as kill -9 would."""


def entry(exact: int) -> dict[str, Any]:
    return {"n": 100, "valid": 97, "validity": 0.97, "exact": exact, "accuracy": exact / 100}


class Stage:
    """Plays commands in ``work``.

    Attributes:
        made: names of what was really made, in order.
        given: the command lines, as typed.
        accuracy: of the evaluation, in %.
        killed_in: a name, in whose middle the next kill comes.
    """

    def __init__(self, root: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.work = root, work
        self.made: list[str] = []
        self.given: list[str] = []
        self.accuracy, self.killed_in = 95, ""
        self.plan: Plan | None = None
        monkeypatch.setattr("vpmoe.quickstart.runner.run_command", self.play)

    def ask(self, **wishes: Any) -> Plan:
        self.plan = Plan.of(self.root, work_dir=self.work, **wishes)
        return self.plan

    def play(self, command: Command, folder: Path) -> None:
        assert folder == self.work and self.plan is not None
        self.given.append(str(command))
        words = list(command.words)
        if words[1] == "tokenizer":
            self.made.append("rank file")
        elif words[1] == "data":
            self._data(words)
        elif words[1] == "train":
            self._train(self.plan)
        else:
            self._evaluate(self.plan, self.work / words[words.index("--output") + 1])

    def _begin(self, name: str) -> None:
        self.made.append(name)
        if self.killed_in == name:
            self.killed_in = ""
            raise Killed

    def _data(self, words: list[str]) -> None:
        verb, output = words[2], self.work / words[words.index("--output-dir") + 1]
        name, kind, write = {
            "synth-mini": ("rows", "synth_mini", {"test.jsonl": "questions"}),
            "convert": ("conversations", "conversations", {"manifest.json": "{}"}),
            "build": ("dataset", "kd", {"manifest.json": "{}"}),
        }[verb]

        def make(work: steps.Work) -> dict[str, Any]:
            self._begin(name)
            for file, text in write.items():
                (work.folder / file).write_text(text)
            return DATASET

        options = [word for word in words if word != "--overwrite"]
        steps.run(steps.Step(kind, 1, output, {"options": options}), make, overwrite="--overwrite" in words)

    def _train(self, plan: Plan) -> None:
        run = self.work / plan.run
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in METRICS))
        iteration = plan.cfg.training.train_iters
        if self.killed_in == "training":
            iteration //= 2
        folder = run / "checkpoints" / f"iter_{iteration:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run_state.json").write_bytes(json_bytes({"iteration": iteration, "world_size": 1}))
        files = {name: entry for name, entry in list_files(folder).items() if name != "files.json"}
        (folder / "files.json").write_bytes(json_bytes(files))
        self._begin("training")

    def _evaluate(self, plan: Plan, output: Path) -> None:
        self._begin("evaluation")
        found = entry(self.accuracy)
        families: Any = plan.settings.rows["families"]
        tasks = {**dict.fromkeys(families, found), "all": {**found, "faults": {}, "mean_tokens": 9.0}}
        sample = {
            "family": next(iter(families)),
            "query": "[bold]?",
            "expected": "1",
            "completion": "[red]x\x1b[2J<|return|>",
            "ids": [1],
        }
        report = {
            "kind": "eval_suite",
            "provenance": provenance(tokenizer={"name": "played"}, dataset="d" * 64),
            "tasks": tasks,
            "losses": {"loss/final": 0.5},
            "samples": [{**sample, "valid": True, "fault": None, "exact": False}],
        }
        output.with_suffix(".png").write_bytes(b"\x89PNG")
        output.write_text(json.dumps(report))


DATASET = {"splits": {split: {"rows": 1, "tokens": 10} for split in ("train", "valid")}}
