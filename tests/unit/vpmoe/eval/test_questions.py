"""Questions from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vpmoe.data_curation.tasks.synth_mini import test_rows as held_out_rows
from vpmoe.errors import DataError
from vpmoe.eval.questions import read_questions


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


def test_a_line_separator_inside_a_text_is_no_end_of_a_line(tmp_path: Path) -> None:
    rows = [{**row("a", 0), "query": "first\u2028second\x85third"}, row("b", 1)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows))
    assert [question.query for question in read_questions(path)] == [entry["query"] for entry in rows]
