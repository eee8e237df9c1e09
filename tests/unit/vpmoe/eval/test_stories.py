"""Stories to order: what counts as kept, whoever wrote the story and however it was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.vpmoe.eval.conftest import ids_of
from vpmoe.cli import main
from vpmoe.data_curation.tasks.stories.checker import Constraints
from vpmoe.eval.asking import AsConversation, AsPassage, Form
from vpmoe.eval.suites.stories import (
    BANNED,
    PROTAGONIST,
    REQUIRED,
    STORY,
    Request,
    entries_of,
    items_of,
    read_requests,
    with_chance,
)
from vpmoe.tokenizer import CompactVocabulary

ASKED = {
    "protagonist": {"name": "Pip", "kind": "fox"},
    "theme": "courage",
    "required_words": ["tunnel", "cake"],
    "banned_words": ["wolf"],
}
KEPT = "Pip the fox ran into a tunnel. Pip found two cakes."
BROKEN = "Max the fox saw a wolf. He had a cake."
FINAL = "<|channel|>final<|message|>{}<|return|>"


def request(**changes: Any) -> Request:
    return Request("a", "Tell me a story.", Constraints.of_row({**ASKED, **changes}))


def lines(story: str, form: Form, asked: Request | None = None) -> dict[str, dict[str, Any]]:
    return {item["task"]: item for item in items_of(asked or request(), ids_of(story, form.tokenizer), form)}


@pytest.mark.parametrize("passage", [False, True])
def test_what_a_story_keeps_to(passage: bool, tokenizer: CompactVocabulary) -> None:
    form: Form = AsPassage(tokenizer) if passage else AsConversation(tokenizer)
    wrapped = "{}<|endoftext|>" if passage else FINAL
    kept, broken = (lines(wrapped.format(story), form) for story in (KEPT, BROKEN))
    assert [kept[task]["correct"] for task in (REQUIRED, PROTAGONIST, BANNED)] == [True] * 3
    assert [broken[task]["correct"] for task in (REQUIRED, PROTAGONIST, BANNED)] == [False] * 3
    assert broken[REQUIRED]["missing"] == ["tunnel"] and broken[BANNED]["banned"] == ["wolf"]
    assert kept[STORY]["valid"] and (kept[STORY]["answer"], broken[STORY]["answer"]) == (KEPT, BROKEN)
    # A story that was cut is held to what it has; nothing at all keeps to nothing but silence, and did not end.
    cut = lines(wrapped.format(KEPT).rpartition("<|")[0], form)
    assert cut[REQUIRED]["correct"] and not cut[STORY]["valid"]
    nothing = lines(wrapped.format(""), form)
    assert not nothing[STORY]["valid"] and not nothing[REQUIRED]["correct"] and nothing[BANNED]["correct"]
    assert {REQUIRED, BANNED} & lines(wrapped.format(KEPT), form, request(required_words=[])).keys() == {BANNED}


def test_a_passage_goes_on_behind_what_is_asked(tokenizer: CompactVocabulary) -> None:
    form = AsPassage(tokenizer)
    assert tokenizer.decode(form.prompt("Tell me.")) == "Tell me.\n\n"
    told = form.judge(ids_of("Pip ran.\n\nThe end.<|endoftext|>", tokenizer))
    assert told.valid and told.final == "Pip ran.\n\nThe end."  # a blank line ends nothing
    assert form.judge(ids_of("Pip ran", tokenizer)).reason == "unclosed"


def test_shares_are_of_what_was_asked_for(tokenizer: CompactVocabulary) -> None:
    form = AsPassage(tokenizer)
    stories = [KEPT, KEPT, BROKEN]
    items = [one for story in stories for one in items_of(request(), ids_of(story, tokenizer), form)]
    items += items_of(request(banned_words=[]), ids_of(KEPT + "<|endoftext|>", tokenizer), form)
    entries = entries_of(items)
    assert {name: entry["n"] for name, entry in entries.items()} == {STORY: 4, REQUIRED: 4, PROTAGONIST: 4, BANNED: 3}
    assert entries[REQUIRED]["accuracy"] == 0.75 and entries[BANNED]["accuracy"] == pytest.approx(2 / 3)
    assert entries[STORY]["validity"] == 0.25
    for entry in entries.values():
        low, high = entry["interval"]
        assert low <= entry.get("accuracy", entry.get("validity")) <= high


def test_by_chance_is_what_the_stories_give_against_the_next_prompt(tokenizer: CompactVocabulary) -> None:
    form = AsPassage(tokenizer)
    other = request(protagonist={"name": "Max", "kind": "fox"}, required_words=["cake"], banned_words=["tunnel"])
    requests = [request(), other]
    items = [
        i
        for asked, told in zip(requests, (KEPT, BROKEN), strict=True)
        for i in items_of(asked, ids_of(told, tokenizer), form)
    ]
    entries = with_chance(entries_of(items), requests, items)
    assert {name: (entry["accuracy"], entry["by_chance"]) for name, entry in entries.items() if name != STORY} == {
        REQUIRED: (1.0, 0.5),
        PROTAGONIST: (1.0, 0.0),
        BANNED: (1.0, 0.0),
    }
    assert "by_chance" not in with_chance(entries_of(items[:4]), requests[:1], items[:4])[REQUIRED]


def write_prompts(path: Path, count: int = 3) -> Path:
    rows = [
        {
            "id": f"p{place}",
            "split": "test" if place else "train",
            "prompt": f"Tell story {place}.",
            "constraints": ASKED,
        }
        for place in range(count + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    assert [one.id for one in read_requests(prompts, "test", None)] == ["p1", "p2", "p3"]
    assert len(read_requests(prompts, "test", 2)) == 2
    for wrong, told in (("valid", "no prompt of the split 'valid'"), ("test", "required_words")):
        if wrong == "test":
            prompts.write_text(prompts.read_text().replace("required_words", "words"))
        assert main(["eval", "stories", str(tmp_path), "--prompts", str(prompts), "--split", wrong]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("passage", [False, True])
def test_report_of_an_untrained_model(
    passage: bool, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = write_prompts(tmp_path / "prompts.jsonl", 5), tmp_path / "report.json"
    words = ["eval", "stories", str(run_directory), "--prompts", str(prompts), "--max-new-tokens", "8"]
    words += ["--output", str(output), *(["--passage"] if passage else [])]
    assert main(words) == 0
    report = json.loads(output.read_text())
    assert report["suite"] == "stories" and report["asked"]["form"] == ("passage" if passage else "conversation")
    assert report["tasks"][PROTAGONIST]["n"] == 5 and report["tasks"][PROTAGONIST]["accuracy"] == 0
    items = [json.loads(line) for line in (tmp_path / "report.items.jsonl").read_text().splitlines()]
    assert len(items) == 4 * 5 and {item["item"] for item in items} == {f"p{place}" for place in range(1, 6)}
    assert len(report["samples"]) == 5 and PROTAGONIST in report["samples"][0]["broken"]
    assert "protagonist" in capsys.readouterr().out
    before = [item["answer"] for item in items if item["task"] == STORY]
    # Each prompt's draws are its own: fewer prompts and other batches change no story.
    assert main([*words, "--overwrite", "--limit", "3", "--batch-size", "1"]) == 0
    items = [json.loads(line) for line in (tmp_path / "report.items.jsonl").read_text().splitlines()]
    assert [item["answer"] for item in items if item["task"] == STORY] == before[:3]
