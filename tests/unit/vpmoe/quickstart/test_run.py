"""The whole quickstart with its commands played by small functions: order, skipping, report, targets, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.errors import NotOursError
from tests.unit.vpmoe.quickstart.played import ORDER, Killed, Stage
from tests.unit.vpmoe.test_provenance_blocks import whole
from vpmoe.quickstart.plan import Plan
from vpmoe.quickstart.report import held_against, training_summary
from vpmoe.quickstart.run import MISSED, run_quickstart
from vpmoe.quickstart.settings import QuickstartError, Targets


@pytest.fixture
def stage(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(repository, tmp_path, monkeypatch)


def play(stage: Stage, **wishes: Any) -> int:
    return run_quickstart(stage.ask(**wishes))


def test_all_in_order_then_nothing(stage: Stage, capsys) -> None:
    assert play(stage) == 0 and stage.made == ORDER
    assert "targets met" in capsys.readouterr().out
    assert play(stage) == 0 and stage.made == [*ORDER, "rank file"]
    assert (
        capsys.readouterr().out.count(": done and valid\n") == 2
    )  # training and evaluation; data's commands say their own
    assert "--overwrite" not in " ".join(stage.given)


@pytest.mark.parametrize("name", ORDER[1:])
def test_killed_anywhere_it_goes_on(stage: Stage, name: str) -> None:
    stage.killed_in = name
    with pytest.raises(Killed):
        play(stage)
    assert play(stage) == 0
    begun = ORDER.index(name)
    assert stage.made == [*ORDER[: begun + 1], "rank file", *ORDER[begun:]]


def test_report_holds_what_was_measured(stage: Stage, capsys) -> None:
    play(stage)
    folder = stage.work / "reports" / "quickstart"
    report = json.loads((folder / "report.json").read_text())
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report["training"]["tokens_per_second"] == 200.0
    assert report["targets"]["met"] and report["evaluation"]["tasks"]["all"]["exact"] == 95
    block = report["provenance"]
    assert whole(block) and block["tokenizer"] == {"name": "played"} and len(block["config_hash"]) == 64
    assert list(report["seconds"]) == ["synth_mini", "conversations", "kd", "training", "evaluation"]
    shown = capsys.readouterr().out
    # The model's text is printed as it is, whatever markup it spells, and drives no terminal.
    assert r"[red]x\x1b[2J<|return|>" in shown and "[bold]?" in shown and "95.0 % (95 of 100)" in shown


def test_missed_target_is_exit_code_1(stage: Stage, capsys) -> None:
    stage.accuracy = 79
    assert play(stage) == MISSED == 1
    assert "TARGET MISSED: accuracy is 79.0 %, at least 92 % is the target" in capsys.readouterr().out
    assert not json.loads((stage.work / "reports" / "quickstart" / "report.json").read_text())["targets"]["met"]


def test_another_length_is_not_held_to_the_target_and_says_so(stage: Stage, capsys) -> None:
    stage.accuracy = 10
    assert play(stage, train_iters=100) == 0
    assert "do not bind with --train-iters 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("force", "again"),
    [("data", ORDER[1:4]), ("train", ORDER[4:]), ("evaluate", ORDER[5:]), ("tokenizer", [])],
)
def test_forced_step_is_done_again(stage: Stage, force: str, again: list[str]) -> None:
    """And what is made of it only where it came out differently; an evaluation goes with its run."""
    play(stage)
    play(stage, force=(force,))
    assert stage.made == [*ORDER, "rank file", *again]


def test_a_run_of_other_settings_is_replaced_only_when_asked(stage: Stage) -> None:
    play(stage, run_name="one")
    with pytest.raises(NotOursError, match=r"config\.training\.train_iters") as caught:
        play(stage, run_name="one", train_iters=100)
    assert "--overwrite" in str(caught.value) and stage.made[-1] == "rank file"
    assert play(stage, run_name="one", train_iters=100, overwrite=True) == 0
    assert stage.made[-2:] == ["training", "evaluation"]
    data = [line for line in stage.given if line.startswith("vpmoe data")][-3:]
    assert all(line.endswith("--overwrite") for line in data)
    assert play(stage, run_name="one", train_iters=200, force=("train",)) == 0
    assert stage.made[-2:] == ["training", "evaluation"]


@pytest.mark.parametrize("wishes", [{}, {"overwrite": True}, {"force": ("train",)}])
def test_a_run_that_the_quickstart_did_not_make_is_never_touched(stage: Stage, wishes: dict[str, Any]) -> None:
    mine = stage.work / stage.ask().run / "checkpoints" / "iter_0000100"
    mine.mkdir(parents=True)
    with pytest.raises(NotOursError, match="no receipt"):
        play(stage, **wishes)
    assert mine.is_dir() and "training" not in stage.made


def test_a_damaged_checkpoint_is_trained_again(stage: Stage) -> None:
    play(stage)
    assert stage.plan is not None
    (state,) = (stage.work / stage.plan.run).rglob("run_state.json")
    state.write_text(state.read_text().replace('"world_size": 1', '"world_size": 2'))
    assert play(stage) == 0
    assert stage.made == [*ORDER, "rank file", "training"]


def test_training_that_ends_early_is_no_success(stage: Stage) -> None:
    asked = stage.ask()
    whole = asked.cfg.training.train_iters
    stage.ask(train_iters=whole // 2)  # what is played
    with pytest.raises(QuickstartError, match=f"step {whole // 2} of {whole}"):
        run_quickstart(asked)


def test_other_run_name_reports_elsewhere(stage: Stage) -> None:
    play(stage, run_name="other")
    assert (stage.work / "reports" / "quickstart" / "other" / "report.json").is_file()


def test_incomplete_checkout_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match="settings"):
        Plan.of(tmp_path, work_dir=tmp_path)


@pytest.mark.parametrize(
    ("validity", "accuracy", "late", "missed"),
    [
        (0.95, 0.90, 0.75, set()),
        (0.9499, 0.95, 0.9, {"validity"}),
        (1.0, 0.8999, 0.9, {"accuracy"}),
        (1.0, 0.95, 0.7499, {"accuracy of sorting"}),
        (0.0, 0.0, 0.0, {"validity", "accuracy", "accuracy of sorting"}),
    ],
)
def test_targets_hold_all_families_together_and_each(
    validity: float, accuracy: float, late: float, missed: set[str]
) -> None:
    whole = {"validity": validity, "accuracy": accuracy}
    tasks = {"addition": {"accuracy": 1.0}, "sorting": {"accuracy": late}, "all": whole}
    held = held_against(Targets(validity=0.95, accuracy=0.9, family_accuracy=0.75), tasks)
    assert held["met"] is (not missed)
    assert {name for name, entry in held["entries"].items() if not entry["met"]} == missed


def test_run_without_throughput_has_none() -> None:
    assert training_summary({"loss/final": [(3, 1.0)]}, 2.0) == {
        "iterations": 3,
        "seconds": 2.0,
        "tokens_per_second": None,
        "last": {"loss/final": 1.0},
    }
