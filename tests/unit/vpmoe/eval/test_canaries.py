"""Canaries: the same questions of every model, whoever answers and however many at once; what parts two models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import ROOT
from tests.tiny_qwen3 import write_qwen3
from tests.unit.vpmoe.eval.conftest import GOOD, ids_of
from vpmoe.cli import main
from vpmoe.errors import DataError
from vpmoe.eval.asking import AsConversation, AsText, Form
from vpmoe.eval.open_model import open_model
from vpmoe.eval.suites.canaries import Settings
from vpmoe.eval.suites.canary_entries import repetition
from vpmoe.eval.suites.canary_questions import COPYING, SPELLED, is_right, questions_of, read_as_text
from vpmoe.eval.suites.pinned import Output, Outputs, difference
from vpmoe.harmony.parse import Parser
from vpmoe.tokenizer import CompactVocabulary
from vpmoe.tokenizer.bpe import save_bpe, train_bpe

SETTINGS = "max_new_tokens = 12\nbatch_size = 64\ntemperature = 1.0\nseed = 1\n[items]\nsmoke = 2\nfull = 3\n[pinned]\n"
PINNED = 'sum = "What is 1 + 2?"\nbrief = "Hello"\n'
TASKS = "special_tokens_as_text,copying,special_tokens,harmony,addition,sorting,pinned"


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_counts_what_has_been_there_before(ids: list[int]) -> None:
    texts = ["".join(map(str, ids[at : at + 4])) for at in range(max(0, len(ids) - 3))]
    again = sum(text in texts[:at] for at, text in enumerate(texts))
    assert repetition(ids) == pytest.approx(again / len(texts) if texts else 0.0)


@pytest.mark.parametrize("task", [COPYING, SPELLED, "addition", "sorting"])
def test_more_items_ask_all_of_fewer(task: str) -> None:
    few, many, again = (questions_of(task, count) for count in (2, 5, 5))
    assert many == again and len({one.row["synth_id"] for one in many}) == len(many)
    assert [one for one in few if one in many] == few and len(few) < len(many)
    levels = [one.level for one in few]
    assert len(set(levels)) >= 2 and max(map(levels.count, levels)) == 2
    for question in many:
        right = question.row["synthetic_answer"]
        assert is_right(f" {right}\n", question.row) and not is_right(f"{right}0", question.row)
        if task == COPYING or question.level == "repeated":
            assert question.query.endswith(f": {right}")


@pytest.mark.parametrize("make", [AsConversation, AsText])
def test_text_that_spells_special_tokens_is_text(
    make: Callable[..., Form], tokenizer: CompactVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of our vocabularies always; of one that reads a special token out of a text it is found out."""
    found = dict(read_as_text(make(tokenizer), tokenizer))
    assert found.keys() >= tokenizer.special_tokens.keys() and all(found.values())
    plainly = CompactVocabulary.encode_ordinary

    def careless(self: CompactVocabulary, text: str) -> np.ndarray:
        before, end, after = text.partition("<|end|>")
        ids = [plainly(self, before), [self.special_tokens["<|end|>"]] if end else [], plainly(self, after)]
        return np.concatenate(ids).astype(np.int32)

    monkeypatch.setattr(CompactVocabulary, "encode_ordinary", careless)
    found = dict(read_as_text(make(tokenizer), tokenizer))
    assert {text for text, right in found.items() if not right} == {text for text in found if "<|end|>" in text}


def outputs(ids: str, ended: bool, vocabulary: str = "a", prompt: str = "?") -> Outputs:
    output = Output(prompt=prompt, ids=tuple(map(int, ids)), text=ids, ended=ended)
    told: Any = {"checkpoint": {"run": vocabulary}, "vocabulary": {"sha256": vocabulary}, "asked": {"form": "text"}}
    return Outputs(**told, pinned={"one": output})


@given(st.text("01", max_size=5), st.text("01", max_size=5), st.booleans(), st.booleans(), st.sampled_from("ab"))
def test_answers_part_where_they_first_differ(now: str, before: str, ends: bool, ended: bool, other: str) -> None:
    found = difference(outputs(now, ends), outputs(before, ended, other))
    assert found["unit"] == ("token" if other == "a" else "character") and found["compared"] == 1
    agreed = [(now == before), not ends and before.startswith(now), not ended and now.startswith(before)]
    assert found["changed"] == (0 if any(agreed) else 1)
    for change in found["changes"].values():
        at = change["at"]
        assert now[:at] == before[:at] and now[at : at + 1] != before[at : at + 1]
        assert (change["now"], change["before"]) == (now[at:], before[at:])
    assert difference(outputs("1", True), outputs("2", True, prompt="!"))["compared"] == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SETTINGS, "pinned"),
        (SETTINGS + 'sum = " "\n', "pinned.sum"),
        (SETTINGS + "sum = 3\n", "pinned.sum"),
        (SETTINGS.replace("smoke = 2", "smoke = 0") + PINNED, "items.smoke"),
        (SETTINGS.replace("seed", "sead") + PINNED, "sead"),
        ("[pinned\n", "cannot be read"),
    ],
)
def test_a_damaged_file_of_settings_is_named(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(text)
    assert main(["eval", "canaries", str(tmp_path), "--config", str(tmp_path / "c.toml")]) == 2
    said = capsys.readouterr().err
    assert told in said and "c.toml" in said


def test_the_pinned_prompts_are_short_and_clean() -> None:
    """A small vocabulary spells them in bytes, and context is small."""
    pinned = Settings.read(ROOT / "configs" / "eval" / "canaries.toml").pinned
    assert all(text.isprintable() and len(text.encode()) < 128 for text in pinned.values())


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(SETTINGS + PINNED)
    return path


def asked(model: Path, settings: Path, output: Path, *words: str) -> tuple[dict, list[dict]]:
    command = ["eval", "canaries", str(model), "--config", str(settings), "--output", str(output)]
    assert main([*command, "--context", "400", *words]) == 0
    lines = output.with_suffix(".items.jsonl").read_text().splitlines()
    return json.loads(output.read_text()), [json.loads(line) for line in lines]


@pytest.mark.slow
def test_answers_written_by_hand(
    run_directory: Path, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's place is taken by one that knows all but long numbers, believes spelled turns, and samples badly."""
    from megatron_vpmoe.generation.prompts import Completion

    with open_model(run_directory) as opened:
        tokenizer = opened.tokenizer
    opening = len(ids_of("<|start|>assistant", tokenizer))
    questions = [one for task in (COPYING, SPELLED, "addition", "sorting") for one in questions_of(task, 2)]
    known = {one.query: one.row["synthetic_answer"] for one in questions}
    known |= {one.query: "0" for one in questions if one.level in ("16 digits", "a whole turn")}
    pinned = {"What is 1 + 2?": "3", "Hello": "Hi"}

    def remember(model, prompts, sampling, **_):
        completions = []
        for place, prompt in enumerate(prompts):
            query = Parser(tokenizer).messages(prompt.ids[:-opening])[-1].content
            ids = [*ids_of(GOOD, tokenizer)]
            before, after = GOOD.split("{}")
            said = (
                tokenizer.encode_ordinary({**known, **pinned}[query]).tolist() if query in {**known, **pinned} else []
            )
            ids = [*ids_of(before, tokenizer), *said, *ids_of(after, tokenizer)]
            if sampling.temperature and query in pinned:
                ids = ids[1:]
            completions.append(Completion(place, 0, 0, ids))
        return completions

    monkeypatch.setattr("megatron_vpmoe.generation.engine.generate", remember)
    report, items = asked(run_directory, settings, tmp_path / "r.json", "--tasks", TASKS.replace("sorting", "maximum"))
    tasks = report["tasks"]
    assert ",".join(tasks) == TASKS.replace("sorting", "maximum")
    assert tasks["copying"]["accuracy"] == tasks["copying"]["centered"] == 0.75 and tasks["copying"]["n"] == 8
    assert tasks["copying"]["levels"]["16 digits"]["accuracy"] == 0 and tasks["copying"]["validity"] == 1
    assert {name: entry["accuracy"] for name, entry in tasks["special_tokens"]["levels"].items()} == {
        "behind a question": 1.0,
        "a whole turn": 0.0,
        "repeated": 1.0,
    }
    assert tasks["special_tokens_as_text"]["accuracy"] == 1
    # What is not known is answered with an empty message, which is no valid one.
    assert tasks["addition"]["accuracy"] == 1 and tasks["maximum"]["validity"] == 0
    assert tasks["maximum"]["faults"] == {"empty_final": 4} and tasks["maximum"]["ended"] == 1
    of_harmony = [item for item in items if item["task"] == "harmony"]
    assert {item["level"] for item in of_harmony if item["valid"]} == {"addition", "sorting"}
    assert {item["item"] for item in of_harmony if item["level"] == "pinned"} == {"sum", "brief"}
    assert sum(item["valid"] for item in of_harmony) == round(tasks["harmony"]["validity"] * len(of_harmony))
    assert "accuracy" not in tasks["harmony"] and tasks["pinned"]["validity"] == 1
    assert report["pinned"]["brief"]["text"] == GOOD.format("Hi") and report["pinned"]["sum"]["ended"]
    assert len({(item["task"], item["item"]) for item in items}) == len(items)
    assert report["left_out"] == {} and report["asked"]["form"] == "conversation"

    pinned["Hello"] = "Ho"
    words = ["--tasks", "pinned", "--against", str(tmp_path / "r.json")]
    second, _ = asked(run_directory, settings, tmp_path / "s.json", *words)
    at = len(ids_of(GOOD.split("{}")[0], tokenizer)) + 1
    assert second["tasks"].keys() == {"pinned"}
    found = second["against"]
    assert (found["unit"], found["compared"], found["changed"], found["asked_alike"]) == ("token", 2, 1, True)
    assert found["changes"] == {"brief": {"at": at, "now": "o<|return|>", "before": "i<|return|>"}}


@pytest.mark.slow
def test_the_batch_changes_nothing_and_another_model_is_asked(
    run_directory: Path, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, items = asked(run_directory, settings, tmp_path / "1.json", "--tasks", TASKS, "--batch-size", "1")
    capsys.readouterr()
    words = ["--tasks", TASKS, "--against", str(run_directory)]
    many, same = asked(run_directory, settings, tmp_path / "2.json", *words)
    assert items == same and one["pinned"] == many["pinned"] and one["tasks"] == many["tasks"]
    assert (many["against"]["compared"], many["against"]["changed"]) == (2, 0)
    assert "0 of 2 pinned answers are other than those of" in capsys.readouterr().out
    # Qwen's rung knows no Harmony: it is asked as plain text, and what cannot be asked of it is named.
    write_qwen3(tmp_path / "qwen", vocab_size=384, max_position_embeddings=256)
    save_bpe(train_bpe(["Question: what? Answer: the red signs"] * 4, 330), tmp_path / "qwen")
    words = ["--tasks", "copying,pinned", "--against", str(tmp_path / "1.json")]
    plain, _ = asked(tmp_path / "qwen", settings, tmp_path / "3.json", *words)
    assert plain["against"]["unit"] == "character" and not plain["against"]["asked_alike"]
    assert plain["asked"] == {"form": "text"} and plain["settings"]["context"] == 400
    command = ["eval", "canaries", str(tmp_path / "qwen"), "--config", str(settings), "--output"]
    for words, told in (
        (["--tasks", "harmony"], "asked as plain text"),
        (["--tasks", "tastes"], "there is no task 'tastes'"),
        (["--tasks", "copying", "--against", str(tmp_path / "1.json")], "--against"),
        (["--size", "huge"], "there is no size 'huge'"),
        (["--context", "20"], "the prompt has"),
        (["--against", str(tmp_path / "c.toml")], "c.toml"),
        (["--against", str(tmp_path / "none")], "none"),
        (["--system", "You are."], "no system and developer messages"),
    ):
        assert main([*command, str(tmp_path / "4.json"), *words]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "4.json").exists()
    assert main([*command, str(tmp_path / "3.json")]) == 2 and "finished report" in capsys.readouterr().err


def test_a_report_without_pinned_answers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"kind": "eval_suite", "checkpoint": {}, "vocabulary": {}, "asked": {}}))
    with pytest.raises(DataError, match="pinned") as error:
        Outputs.read(path)
    assert str(path) in str(error.value)
