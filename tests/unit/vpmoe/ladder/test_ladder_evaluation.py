"""Bits per byte and greedy answers of a rung, text by text and question by question as transformers has them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.vpmoe.ladder.tiny_ladder import evaluation, write_ladder
from vpmoe.data_curation.tasks.question_texts import prompt
from vpmoe.errors import DataError
from vpmoe.hf.convert import import_directory, open_directory
from vpmoe.ladder.evaluation import HeldOut, evaluate


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("ladder")
    write_ladder(folder, repository)
    import_directory(open_directory(folder / "model_hf"), folder / "object" / "megatron")
    (folder / "object" / "hf").symlink_to(folder / "model_hf")
    return folder


def found(root: Path, **changes: object) -> dict:
    settings = evaluation(root, **changes)
    return evaluate(root / "object", HeldOut.read(settings), settings, progress=lambda line: None)


def test_texts_and_answers_are_those_of_transformers(root: Path) -> None:
    ours = found(root)
    model: Any = AutoModelForCausalLM.from_pretrained(root / "model_hf")
    tokenizer = AutoTokenizer.from_pretrained(root / "model_hf")
    held_out = HeldOut.read(evaluation(root))
    assert len(held_out.texts) == 9 and max(map(len, held_out.texts)) <= 60

    nats, tokens, scored = 0.0, 0, 0
    for text in held_out.texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        scored += len(text) - len(tokenizer.decode(ids[0, :1]))
    assert ours["texts"]["tokens"] == tokens and ours["texts"]["bytes"] == scored
    assert ours["texts"]["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert ours["texts"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / scored, rel=1e-5)

    for sample, question in zip(ours["questions"]["samples"], held_out.questions, strict=False):
        ids = tokenizer(prompt(question.query), return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["answer"] == text.split("\n")[0].strip()
    assert ours["questions"]["n"] == 8 and set(ours["questions"]["families"]) == {"sorting", "maximum"}


def test_batches_change_nothing(root: Path) -> None:
    one, many = found(root, batch_size=1), found(root, batch_size=8)
    assert one["questions"] == many["questions"]
    assert one["texts"]["nats_per_token"] == pytest.approx(many["texts"]["nats_per_token"], rel=1e-6)


def test_an_expected_answer_counts(root: Path, tmp_path: Path) -> None:
    """Of questions whose expected answer is what the model says, and others, the first are right, family by family."""
    rows = [json.loads(line) for line in (root / "rows" / "test.jsonl").read_text().splitlines()]
    chosen = [next(row for row in rows if row["exercise"] == family) for family in ("sorting", "maximum")]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    said = {entry["query"]: entry["answer"] for entry in found(root, questions=path)["questions"]["samples"]}
    right = {**chosen[0], "synthetic_answer": f" {said[chosen[0]['query']]} "}
    wrong = {**chosen[1], "synthetic_answer": f"{said[chosen[1]['query']]}."}
    path.write_text("".join(json.dumps(row) + "\n" for row in (right, wrong, right)))
    counted = found(root, questions=path)["questions"]
    assert (counted["exact"], counted["n"]) == (2, 3)
    assert counted["families"]["sorting"].items() >= {"n": 2, "exact": 2, "accuracy": 1.0}.items()
    assert counted["families"]["maximum"].items() >= {"n": 1, "exact": 0, "accuracy": 0.0}.items()


def test_what_is_asked_is_part_of_its_hash(root: Path, tmp_path: Path) -> None:
    before = HeldOut.read(evaluation(root)).decides
    assert HeldOut.read(evaluation(root, batch_size=1)).decides == before
    for change in ({"documents": 8}, {"characters": 20}, {"per_family": 3}, {"max_new_tokens": 5}):
        assert HeldOut.read(evaluation(root, **change)).decides != before
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no text to evaluate on"):
        HeldOut.read(evaluation(root, texts=tmp_path / "empty.jsonl"))
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match="no text in 'text'"):
        HeldOut.read(evaluation(root, texts=tmp_path / "number.jsonl"))
