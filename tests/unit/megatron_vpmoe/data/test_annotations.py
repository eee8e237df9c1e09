"""Annotations: laid out, padded and moved by their declaration alone; what is not as declared is refused by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megatron_vpmoe.data.batch import PADDING, Document, assemble
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import Annotation
from tests.fixtures_dataset import EOD, conversation

LOG_P = Annotation(name="reference_log_p", dtype="float32")
IDS = Annotation(name="teacher_ids", dtype="int32", width=3)
REWARD = Annotation(name="reward", dtype="float32", per="document")
GROUP = Annotation(name="group_id", dtype="int64", per="document")
ALL = (LOG_P, IDS, REWARD, GROUP)


def annotated(length: int, seed: int, declared: Sequence[Annotation] = ALL) -> Document:
    random = np.random.default_rng(seed)
    arrays = {a.name: (100 * random.random(a.shape(length)) + 1).astype(a.dtype) for a in declared}
    return replace(conversation(length, seed), annotations=arrays)


def test_every_token_and_document_has_its_own_and_padding_has_none() -> None:
    rows = [[annotated(12, 0), annotated(16, 1), annotated(9, 2)], [annotated(20, 3)], []]
    batch = assemble(rows, seq_length=40, eod_id=EOD, sample_ids=[7, 8, PADDING], annotations=ALL)
    assert {name: (list(x.shape), x.dtype) for name, x in batch.annotations.items()} == {
        "reference_log_p": ([3, 40], torch.float32),
        "teacher_ids": ([3, 40, 3], torch.int32),
        "reward": ([3, 3], torch.float32),
        "group_id": ([3, 3], torch.int64),
    }
    for row, documents in enumerate(rows):
        for number, document in enumerate(documents):
            where = (batch.document_id[row] == number).nonzero().flatten()
            for name in ("reference_log_p", "teacher_ids"):
                stored, laid = torch.from_numpy(document.annotations[name]), batch.annotations[name][row, where]
                assert torch.equal(laid[:-1], stored[:-1])
                assert not laid[-1].any()  # it would describe a token past the document
            for name in ("reward", "group_id"):
                value = document.annotations[name]
                assert batch.annotations[name][row, number] == value.item()
                assert (batch.per_token(name)[row, where] == value.item()).all()
    padding = batch.document_id == PADDING
    assert (
        not batch.annotations["reference_log_p"][padding].any() and not batch.annotations["teacher_ids"][padding].any()
    )
    assert not batch.annotations["reward"][1, 1:].any() and not batch.annotations["reward"][2].any()


def test_only_what_is_declared_is_carried() -> None:
    batch = assemble([[annotated(9, 0)]], seq_length=16, eod_id=EOD, sample_ids=[0], annotations=[REWARD])
    assert set(batch.annotations) == {"reward"}
    assert assemble([[annotated(9, 0)]], seq_length=16, eod_id=EOD, sample_ids=[0]).annotations == {}


def test_they_move_with_the_batch() -> None:
    batch = assemble([[annotated(9, 0)]], seq_length=16, eod_id=EOD, sample_ids=[0], annotations=ALL).to("meta")
    assert all(values.is_meta for values in (batch.tokens, *batch.annotations.values()))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda arrays: arrays.pop("reward"), "sample 5, document 1.*lacks the annotation 'reward'"),
        (lambda a: a.update(teacher_ids=a["teacher_ids"][:, :2]), r"'teacher_ids'.*\[9, 2\].*\[9, 3\]"),
        (lambda a: a.update(reference_log_p=a["reference_log_p"][:-1]), r"'reference_log_p'.*\[8\].*\[9\]"),
        (lambda a: a.update(reference_log_p=a["reference_log_p"].astype(np.float64)), "float64.*float32"),
        (lambda a: a.update(group_id=np.ones(1, np.int64)), r"'group_id'.*\[1\].*\[\]"),
    ],
)
def test_what_is_not_as_declared_is_refused(change: Any, what: str) -> None:
    wrong = annotated(9, 1)
    change(wrong.annotations)
    with pytest.raises(DataError) as caught:
        assemble([[annotated(9, 0), wrong]], seq_length=32, eod_id=EOD, sample_ids=[5], annotations=ALL)
    assert re.search(what, f"{caught.value.source}: {caught.value.what}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "Reward"},
        {"name": "../reward"},
        {"dtype": "float64"},
        {"per": "row"},
        {"width": 0},
        {"per": "document", "width": 2},
    ],
)
def test_what_cannot_be_declared(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Annotation(**{"name": "reward", "dtype": "float32", **wrong})
