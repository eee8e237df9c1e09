"""Pairs of a model's own making: which answers give one, and questions by the split that the model was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpmoe.data_curation.datasets.plan import split_of
from vpmoe.data_curation.tasks.synth_mini import POOL_NAME, generate, make_row
from vpmoe.errors import DataError
from vpmoe.eval.pairs import pairs_of, questions_of
from vpmoe.eval.questions import Question
from vpmoe.eval.scoring import Scored
from vpmoe.harmony.parse import Judgement

MIX = {"addition": 1.0}


def test_valid_wrong_answers_give_pairs() -> None:
    row = make_row(0, 0, MIX)
    judged = [
        (Judgement(True, None, "so", row["synthetic_answer"]), True),
        (Judgement(False, "unclosed", "so", None), False),
        (Judgement(True, None, "wrongly", "no number"), False),
    ]
    (pair,) = pairs_of([Scored(Question(row), (1,), judgement, exact) for judgement, exact in judged])
    right = {"role": "assistant", "thinking": row["synthetic_reasoning"], "content": row["synthetic_answer"]}
    assert pair == {
        "synth_id": row["synth_id"],
        "prompt": row["query"],
        "chosen": [right],
        "rejected": [{"role": "assistant", "thinking": "wrongly", "content": "no number"}],
    }


def test_questions_are_of_their_split(tmp_path: Path) -> None:
    generate(tmp_path / "rows", rows=100, seed=0, families=MIX)
    path = tmp_path / "rows" / POOL_NAME
    asked = questions_of(path, {"train": 30, "valid": 10}, 0.5)
    assert [split_of(one.row["synth_id"], 0.5) for one in asked] == ["train"] * 30 + ["valid"] * 10
    with pytest.raises(DataError, match="99 questions of the split 'valid'"):
        questions_of(path, {"train": 1, "valid": 99}, 0.5)
    with pytest.raises(DataError, match="no rows"):
        questions_of(tmp_path / POOL_NAME, {"train": 1}, 0.5)
