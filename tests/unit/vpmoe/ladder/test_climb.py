"""A climb: what is done and valid is skipped, what is not is done, and the report says what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.files import sha256_of_file
from tests.unit.vpmoe.ladder.tiny_ladder import write_ladder
from tests.unit.vpmoe.test_provenance_blocks import whole
from vpmoe.cli import main
from vpmoe.errors import NotOursError, UpcycleError
from vpmoe.ladder import climb as module
from vpmoe.ladder.climb import Request, climb, listing
from vpmoe.ladder.report import pinned_lines, table, with_deltas
from vpmoe.ladder.suites import pinned_changes


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    return write_ladder(tmp_path_factory.mktemp("climb"), repository)


def go(ladder: Path, *, overwrite: bool = False) -> tuple[dict, list[str]]:
    lines: list[str] = []
    return climb(Request(ladder, quiet=True, overwrite=overwrite), lines.append), lines


@pytest.mark.slow
def test_climbing_twice_does_nothing_the_second_time(ladder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "to be made: not made yet; to be evaluated" in listing(Request(ladder))[0]
    report, _ = go(ladder)
    (step,) = report["steps"]
    assert whole(report["provenance"]) and report["provenance"]["config_hash"] == sha256_of_file(ladder)
    assert report["provenance"]["dataset_manifest_sha256"] == {"model": None}, "nobody trained it"
    assert step["delta"] == {"bits_per_byte": 0.0, "accuracy": 0.0}
    assert step["job_time"]["seconds"] > 0 and step["evaluation_time"]["seconds"] > 0
    receipt = json.loads((ladder.parent / "model" / "receipt.json").read_text())
    assert step["weights_sha256"] == receipt["report"]["weights_sha256"]
    folder = ladder.parent / "reports"
    assert json.loads((folder / "ladder.json").read_text()) == report
    assert (folder / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert f"{step['evaluation']['texts']['bits_per_byte']:.4f}" in (folder / "ladder.md").read_text()

    def never(*_arguments: object, **_options: object) -> None:
        raise AssertionError("evaluated again")

    known_by = {"core8": "core8_centered_mean", "canaries": "exact_mean", "windows": "bits_per_byte"}
    for label, number in known_by.items():
        suite, table = step["suites"][label], (folder / "ladder.md").read_text()
        assert suite["number"] == number and suite["delta"] == 0 and suite["time"]["seconds"] > 0
        assert f"{suite['value']:.4f} | +0.0000" in table
        written = json.loads((folder / "eval" / label / "model" / "model.json").read_text())
        assert written["kind"] == "eval_suite" and written["checkpoint"]["run"] == "model"
        assert (folder / "eval" / label / "model" / "model.items.jsonl").is_file()
    assert "CORE-8, centered accuracy | Δ rung 1" in table and "windows, bits/byte" in table
    assert step["suites"]["windows"]["value"] == pytest.approx(written["tasks"]["text"]["bits_per_byte"])
    assert (written["settings"]["window"], written["tasks"]["text"]["n"]) == (24, 5)
    assert step["suites"]["canaries"]["form"] == "text" and step["suites"]["canaries"]["pinned"] is None
    assert step["suites"]["canaries"]["numbers"].keys() >= {"copying/accuracy", "pinned/repetition"}
    canaries = json.loads((folder / "eval" / "canaries" / "model" / "model.json").read_text())
    assert canaries["left_out"] == {"harmony": "asked as plain text"} and "harmony" not in canaries["tasks"]
    assert step["suites"]["core8"]["numbers"].keys() >= {"colors/accuracy", "last_word/centered"}

    monkeypatch.setattr(module, "evaluate", never)
    monkeypatch.setattr(module.RungSuite, "ask", never)
    again, lines = go(ladder)
    assert f"  {folder / 'model'}: done and valid" in lines
    assert f"  {folder / 'eval' / 'core8' / 'model'}: done and valid" in lines
    assert again["steps"] == report["steps"]
    assert "done and up to date; evaluated" in listing(Request(ladder))[0]


@pytest.mark.parametrize(
    ("tags", "shown"),
    [
        (["valid/loss/total", "valid/loss/final"], "2.0000 → 1.5000"),
        (["valid/text/loss/total", "valid/chat/loss/total"], "text 2.0000 → 1.5000, chat 2.0000 → 1.5000"),
        (["valid/text/loss/final"], ""),
    ],
)
def test_the_validation_of_every_dataset_is_in_the_table(tags: list[str], shown: str) -> None:
    validation = {tag: {"before": 2.0, "after": 1.5} for tag in tags}
    fed = {"object": "x", "job": "heal", "validation": validation, "job_time": {"seconds": 1, "processor_seconds": 1}}
    assert f"(heal, {shown}, 1 (1))" in table([], [fed], {"seconds": 1, "processor_seconds": 1})


def test_what_a_stage_gained_is_against_the_object_below() -> None:
    """As a conversation; where that one was not asked so, there is no such gain."""

    def record(name: str, below: str | None, bits: float, plain: int, talk: int | None) -> dict[str, Any]:
        questions, conversations = (
            None if exact is None else {"n": 4, "exact": exact, "accuracy": exact / 4, "valid": 4}
            for exact in (plain, talk)
        )
        texts = {"bits_per_byte": bits, "nats_per_token": bits}
        return {
            "object": name,
            "rung": 7,
            "input": below,
            "job": "heal",
            "training": {"objective": "topk_kd"},
            "evaluation": {"texts": texts, "questions": questions, "conversations": conversations},
            "suites": {},
            "job_time": {"seconds": 1, "processor_seconds": 1},
            "evaluation_time": {"seconds": 1, "processor_seconds": 1},
            "weights_sha256": name,
        }

    found = with_deltas([record("a", None, 1, 4, None), record("b", "a", 2, 3, 1), record("c", "b", 2, 3, 3)])
    assert [one["gain"] for one in found] == [
        None,
        {"bits_per_byte": 1, "accuracy": -0.25},
        {"bits_per_byte": 0, "accuracy": 0, "conversations": 0.5},
    ]
    lines = table(found, [], {"seconds": 1, "processor_seconds": 1}).splitlines()
    assert "exact as conversation | Δ below" in lines[0] and "25.0 % (1/4), 4 valid |  |" in lines[3]
    assert "| heal, topk_kd |" in lines[4] and "75.0 % (3/4), 4 valid | +50.0 |" in lines[4]


def test_pinned_answers_are_held_against_the_object_below(tmp_path: Path) -> None:
    """By token, of two vocabularies by character; asked in another form they are not, and the table says why."""

    def write(name: str, text: str, vocabulary: str, form: str = "text") -> Path:
        output = {"prompt": "?", "ids": list(map(ord, text)), "text": text, "ended": True}
        told = {"kind": "eval_suite", "checkpoint": {"run": name}, "vocabulary": {"sha256": vocabulary}}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**told, "asked": {"form": form}, "pinned": {"one": output} if text else {}}))
        return path

    old = write("old", "yes", "a")
    assert pinned_changes(old, None) is None and pinned_changes(write("none", "", "a"), old) is None
    found = {
        name: pinned_changes(write(name, *how), old)
        for name, how in {"same": ("yes", "a"), "other": ("yet", "b"), "talk": ("yes", "a", "conversation")}.items()
    }
    records = [
        {"object": name, "input": "old", "suites": {"canaries": {"pinned": pinned}}} for name, pinned in found.items()
    ]
    assert pinned_lines(records)[:3] == [
        "- canaries, pinned answers of `same`: 0 of 1 other than those of `old`",
        "- canaries, pinned answers of `other`: 1 of 1 other than those of `old` by character, as the vocabularies "
        "differ",
        "- canaries, pinned answers of `talk`: not compared with those of `old`, which was asked otherwise (form or "
        "messages)",
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ('tasks = ["harmony", "copying"], plain = true', "harmony: there is none where all are asked as plain text"),
        ('tasks = ["harmony", "pinned"]', "harmony: not each model has it"),
    ],
)
def test_harmony_that_some_rungs_cannot_be_asked_is_refused_at_once(
    options: str, told: str, tmp_path: Path, repository: Path
) -> None:
    path = write_ladder(tmp_path, repository)
    path.write_text(path.read_text().replace('tasks = ["copying", "harmony", "pinned"]', options))
    with pytest.raises(ConfigError, match=told) as error:
        climb(Request(path, quiet=True), lambda line: None)
    assert "evaluation.suites: canaries: tasks" in str(error.value) and not (tmp_path / "model").exists()


@pytest.mark.slow
def test_other_questions_are_asked_again(ladder: Path) -> None:
    before, _ = go(ladder)
    ladder.write_text(ladder.read_text().replace("per_family = 4", "per_family = 3"))
    assert "done and up to date; to be evaluated" in listing(Request(ladder))[0]
    with pytest.raises(NotOursError, match=r"asked\.per_family: 4 -> 3"):
        go(ladder)
    after, _ = go(ladder, overwrite=True)
    assert (before["steps"][0]["evaluation"]["questions"]["n"], after["steps"][0]["evaluation"]["questions"]["n"]) == (
        8,
        6,
    )
    assert after["steps"][0]["job_time"] == before["steps"][0]["job_time"], "the job was done before"


@pytest.mark.slow
def test_another_suite_alone_is_asked_again(ladder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted climb goes on with the suite that was not asked; what others found stays."""
    before, _ = go(ladder, overwrite=True)
    ladder.write_text(ladder.read_text().replace("items = 5", "items = 4"))
    assert "done and up to date; to be evaluated" in listing(Request(ladder))[0]
    with pytest.raises(NotOursError, match=r"asked\.read: "):
        go(ladder)
    asked: list[str] = []
    ask = module.RungSuite.ask

    def interrupted(self: module.RungSuite, *arguments: Any) -> Any:
        asked.append(self.label)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return ask(self, *arguments)

    monkeypatch.setattr(module.RungSuite, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(ladder, overwrite=True)
    after, _ = go(ladder, overwrite=True)
    assert asked == ["windows", "windows"]
    (old,), (new,) = before["steps"], after["steps"]
    assert new["evaluation"] == old["evaluation"] and new["suites"]["core8"] == old["suites"]["core8"]
    assert new["suites"]["windows"]["value"] != old["suites"]["windows"]["value"]


@pytest.mark.slow
def test_an_object_out_of_date_is_made_again_when_asked(ladder: Path) -> None:
    go(ladder)
    before = json.loads((ladder.parent / "reports" / "model" / "receipt.json").read_text())
    ladder.write_text(ladder.read_text().replace("prompt_lengths = [3]", "prompt_lengths = [4]"))
    with pytest.raises(NotOursError, match=r"settings\.prompt_lengths: \[3\] -> \[4\]"):
        go(ladder)
    go(ladder, overwrite=True)
    # The same weights as before: nothing to ask again.
    assert json.loads((ladder.parent / "reports" / "model" / "receipt.json").read_text()) == before


@pytest.mark.parametrize("name", ["ladder.json", "ladder.md", "ladder.png"])
def test_a_file_of_the_users_in_the_folder_stays(ladder: Path, tmp_path: Path, name: str) -> None:
    """Known before anything is made."""
    (tmp_path / name).write_text("years of work")
    with pytest.raises(NotOursError, match=name):
        climb(Request(ladder, reports=tmp_path), lambda line: pytest.fail(line))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "years of work"


def test_what_is_refused(ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "ladder.toml"
    text = ladder.read_text().replace("documents = 9", "documents = 0\ncolour = 1").replace('"model_hf" }', '"no" }')
    wrong.write_text(
        text.replace('target = "model"', 'target = "none"').replace(
            "rung = 0", 'rung = -1\n[objects.a]\nrung = 1\njob = "heal"'
        )
    )
    assert main(["ladder", str(wrong), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert all(key in said for key in ("evaluation.documents", "evaluation.colour", "objects.model_hf.rung"))
    # What two entries say of each other too, in the same round.
    assert "objects.model.inputs: there is no object 'no'" in said and "target: there is no object 'none'" in said
    assert "objects.a.config" in said and "6 problems" in said
    assert main(["ladder", str(ladder), "--from", "5", "--dry-run"]) == 2
    assert "no object of rungs 5 to 1" in capsys.readouterr().err
    for change, what in (
        ('suite = "core9"', "there is no suite 'core9' for a ladder"),
        ('suite = "core8"\nname = "windows"', "two suites are called windows"),
    ):
        wrong.write_text(ladder.read_text().replace('suite = "core8"', change))
        assert main(["ladder", str(wrong), "--dry-run"]) == 2
        assert what in capsys.readouterr().err
    wrong.write_text('prepare = ["data stats"]\n' + ladder.read_text().replace("greedy_steps", "greedy_stps"))
    with pytest.raises(UpcycleError, match="greedy_stps"):  # before anything is prepared or made
        climb(Request(wrong), [].append)


@pytest.mark.slow
def test_what_a_ladder_prepares_comes_first(ladder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before its files are looked for; a command that fails ends the climb with its exit code."""
    command = f"data question-texts --input-dir {ladder.parent}/rows --output-dir {tmp_path}/texts"
    text = ladder.read_text().replace(f"{ladder.parent}/texts/test.jsonl", f"{tmp_path}/texts/test.jsonl")
    prepared = tmp_path / "ladder.toml"
    prepared.write_text(f'prepare = ["{command}"]\n' + text.replace(f"{ladder.parent}/reports", f"{tmp_path}/reports"))
    report, lines = go(prepared)
    assert lines[0] == f"$ vpmoe {command}"
    assert report["steps"][0]["evaluation"]["texts"]["documents"] == 9
    prepared.write_text('prepare = ["data no-such-verb"]\n' + text)
    assert main(["ladder", str(prepared)]) == 2
    assert "no-such-verb" in capfd.readouterr().err
