"""Questions from files, and prompts that are the beginning of what the model was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.tasks.synth_mini import test_rows as held_out_rows
from vpmoe.errors import DataError
from vpmoe.eval.questions import context_messages, prompt_ids, read_questions
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.prompts import Prompts
from vpmoe.harmony.renderer import FastRenderer


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(family: str, number: int) -> dict[str, str]:
    return {"query": f"{family} {number}", "exercise": family, "synthetic_answer": "1"}


def test_first_of_each_family_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [row("a", 0), row("b", 0), row("a", 1), row("a", 2), row("b", 1)]
    path = write_rows(tmp_path / "q.jsonl", rows)
    assert [question.query for question in read_questions(path, per_family=2)] == ["a 0", "b 0", "a 1", "b 1"]
    assert len(read_questions(path)) == 5


def test_reads_what_synth_mini_holds_out(tmp_path: Path) -> None:
    rows = list(held_out_rows({"addition": 1.0, "sorting": 1.0}, 1))[:50]
    questions = read_questions(write_rows(tmp_path / "test.jsonl", rows))
    assert {question.family for question in questions} == {"addition", "sorting"}


@pytest.mark.parametrize("line", ["{", "3", '{"query": "x"}', '{"query": 1, "exercise": "a", "synthetic_answer": "1"}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row("a", 0)) + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert caught.value.source == f"{path}:2"


@pytest.mark.parametrize("content", [None, ""])
def test_no_questions(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match="question"):
        read_questions(path)


def test_prompt_is_a_prefix_of_the_trained_conversation(tokenizer) -> None:
    context = Prompts(developer_instructions="Be brief.").messages()
    user = Message("user", "What is 7 + 8?")
    replies = (Message("assistant", "15", "analysis"), Message("assistant", "15", "final"))
    trained = FastRenderer(tokenizer).render([*context, user, *replies]).tokens().tolist()
    (prompt,) = prompt_ids(tokenizer, context, [user.content])
    assert trained[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<|start|>assistant")
    assert tokenizer.decode(trained[len(prompt) :]).startswith("<|channel|>analysis")


def datasets(folder: Path, developer: str | None) -> tuple[Path, Path]:
    conversations, dataset = folder / "conversations", folder / "dataset"
    for path in (conversations, dataset):
        path.mkdir()
    prompts = Prompts(developer_instructions=developer).as_manifest()
    (conversations / "manifest.json").write_text(json.dumps({"kind": "harmony_conversations", "prompts": prompts}))
    named = {"kind": "harmony_kd", "input_manifest_sha256": sha256_of_file(conversations / "manifest.json")}
    (dataset / "manifest.json").write_text(json.dumps(named))
    return conversations, dataset


@pytest.mark.parametrize("developer", [None, "Be brief."])
def test_context_is_the_one_of_the_dataset(tmp_path: Path, developer: str | None) -> None:
    conversations, dataset = datasets(tmp_path, developer)
    assert context_messages(conversations, dataset) == Prompts(developer_instructions=developer).messages()


def test_conversations_of_another_dataset_are_refused(tmp_path: Path) -> None:
    conversations, dataset = datasets(tmp_path, None)
    path = conversations / "manifest.json"
    path.write_text(path.read_text().replace("vpMoE", "somebody"))
    with pytest.raises(DataError, match="the dataset was built from"):
        context_messages(conversations, dataset)
