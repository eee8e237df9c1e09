"""The whole quickstart with its jobs played by small programs: order, skipping, report, targets, exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from vpmoe.commands import Command, CommandFailed
from vpmoe.eval.plots import plot_run
from vpmoe.quickstart import outputs
from vpmoe.quickstart.errors import QuickstartError
from vpmoe.quickstart.jobs import Job
from vpmoe.quickstart.plan import Plan
from vpmoe.quickstart.report import held_against, training_summary
from vpmoe.quickstart.run import MISSED, Request, run_quickstart
from vpmoe.quickstart.settings import Targets

METRICS = [
    {"step": 10, "tag": "throughput/tokens_per_second", "value": 100.0},
    {"step": 20, "tag": "throughput/tokens_per_second", "value": 300.0},
    {"step": 30, "tag": "throughput/tokens_per_second", "value": 200.0},
    {"step": 30, "tag": "loss/final", "value": 0.5},
]


def entry(exact: int) -> dict:
    return {"n": 100, "valid": 97, "validity": 0.97, "exact": exact, "accuracy": exact / 100}


class Stage:
    """Jobs whose commands count their calls; what the real ones would have made is laid out before."""

    def __init__(self, root: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.work = root, work
        self.failing: str | None = None
        real = Plan.jobs
        monkeypatch.setattr(Plan, "jobs", lambda plan: [self._played(job) for job in real(plan)])

    def lay_out(self, plan: Plan, accuracy: int) -> None:
        dataset = self.work / plan.dataset_path
        dataset.mkdir(parents=True, exist_ok=True)
        splits = {split: {"rows": 1, "tokens": 10, "shards": []} for split in ("train", "valid")}
        (dataset / "manifest.json").write_text(json.dumps({"kind": "harmony_kd", "splits": splits}))
        run = self.work / plan.run_path
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in METRICS))
        family = plan.settings.targets.family
        generations = {**entry(accuracy), "families": {family: entry(accuracy)}, "faults": {}, "mean_tokens": 9.0}
        sample = {"family": family, "query": "[bold]?", "expected": "1", "completion": "[red]x<|return|>", "ids": [1]}
        report = {
            "kind": "nano_evaluation",
            "generations": generations,
            "losses": {"loss/final": 0.5},
            "samples": [{**sample, "valid": True, "fault": None, "exact": False}],
        }
        path = self.work / plan.evaluation_path
        path.write_text(json.dumps(report))
        plot_run({}, generations, path.with_suffix(".png"), title="")

    def calls(self) -> list[str]:
        path = self.work / "calls"
        return path.read_text().split() if path.exists() else []

    def _played(self, job: Job) -> Job:
        slug = job.name.replace(" ", "_")
        mark = self.work / f"{slug}.made"
        code = f"open('calls', 'a').write('{slug} '); open('{slug}.made', 'w')"
        if job.name == self.failing:
            code += "; raise SystemExit(2)"
        return replace(
            job,
            folder=None,
            record=self.work / "records" / f"{slug}.json",
            inputs=lambda: {"job": job.name},
            outputs=partial(self._digest, mark),
            commands=lambda beginning: [Command(("python", "-c", code))],
            prepare=lambda beginning: None,
            complete=lambda made: True,
        )

    @staticmethod
    def _digest(mark: Path) -> outputs.Values | None:
        return {"made": True} if mark.exists() else None


@pytest.fixture
def stage(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(repository, tmp_path, monkeypatch)


ORDER = ["rank_file", "rows", "conversations", "dataset", "training", "evaluation"]


def play(stage: Stage, accuracy: int, **wishes) -> int:
    request = Request(work_dir=stage.work, **wishes)
    stage.lay_out(request.plan(stage.root), accuracy)
    return run_quickstart(request, stage.root)


def test_all_jobs_in_order_then_none(stage: Stage, capsys) -> None:
    assert play(stage, 90) == 0
    assert stage.calls() == ORDER
    assert "targets met" in capsys.readouterr().out
    assert play(stage, 90) == 0
    assert stage.calls() == ORDER
    assert capsys.readouterr().out.count("done and valid, skipped") == len(ORDER)


def test_report_holds_what_was_measured(stage: Stage, capsys) -> None:
    play(stage, 90)
    folder = stage.work / "reports" / "quickstart"
    report = json.loads((folder / "report.json").read_text())
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report["training"]["tokens_per_second"] == 200.0
    assert report["targets"]["met"] and report["evaluation"]["generations"]["exact"] == 90
    shown = capsys.readouterr().out
    # The model's text is printed as it is, whatever markup it spells.
    assert "[red]x<|return|>" in shown and "[bold]?" in shown and "90.0 % (90 of 100)" in shown


def test_missed_target_is_exit_code_1(stage: Stage, capsys) -> None:
    assert play(stage, 79) == MISSED == 1
    assert "TARGET MISSED: accuracy of addition is 79.0 %" in capsys.readouterr().out
    assert not json.loads((stage.work / "reports" / "quickstart" / "report.json").read_text())["targets"]["met"]


def test_another_length_is_not_held_to_the_target_and_says_so(stage: Stage, capsys) -> None:
    assert play(stage, 10, train_iters=100) == 0
    assert "do not bind with --train-iters 100" in capsys.readouterr().out


def test_goes_on_where_it_stopped(stage: Stage) -> None:
    stage.failing = "conversations"
    with pytest.raises(CommandFailed) as caught:
        play(stage, 90)
    assert caught.value.exit_code == 2
    stage.failing = None
    assert play(stage, 90) == 0
    assert stage.calls() == ["rank_file", "rows", "conversations", *ORDER[2:]]


def test_forced_step_is_done_again(stage: Stage) -> None:
    play(stage, 90)
    play(stage, 90, force=("data",))
    assert stage.calls() == [*ORDER, "rows", "conversations", "dataset"]


def test_other_run_name_reports_elsewhere(stage: Stage) -> None:
    play(stage, 90, run_name="other")
    assert (stage.work / "reports" / "quickstart" / "other" / "report.json").is_file()


def test_incomplete_checkout_is_an_error(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match="settings"):
        run_quickstart(Request(work_dir=tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("validity", "accuracy", "met"), [(0.95, 0.80, True), (0.9499, 0.9, False), (1.0, 0.7999, False), (0.0, 0.0, False)]
)
def test_targets(validity: float, accuracy: float, met: bool) -> None:
    targets = Targets(validity=0.95, family="addition", accuracy=0.8)
    generations = {"validity": validity, "families": {"addition": {"accuracy": accuracy}, "sorting": {"accuracy": 0.0}}}
    held = held_against(targets, generations)
    assert held["met"] is met
    assert held["entries"]["validity"]["met"] is (validity >= 0.95)


def test_run_without_throughput_has_none() -> None:
    assert training_summary({"loss/final": [(3, 1.0)]}, 2.0) == {
        "iterations": 3,
        "seconds": 2.0,
        "tokens_per_second": None,
        "last": {"loss/final": 1.0},
    }
