"""Annotations: laid out, padded and moved by their declaration alone; what is not as declared is refused by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megatron_vpmoe.annotation import NO_RECORD, Annotation
from megatron_vpmoe.data.batch import PADDING, Document, assemble
from megatron_vpmoe.data.blend import Part, open_parts
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.sources import StoredSource, ValidSource
from megatron_vpmoe.teacher_records import TeacherRecords
from tests.fixtures_dataset import EOD, PADDED_VOCAB, conversation, rewrite_manifest, small_dataset, write_annotation
from tests.tiny import tiny_config

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


def annotated_dataset(folder: Path, declared: Sequence[Annotation] = ALL) -> tuple[Path, list[Document]]:
    """A dataset with sidecars, and the documents of its training split in the order of the files."""
    root = small_dataset(folder, train=12, valid=4)
    documents: list[Document] = []

    def annotate(manifest: dict[str, Any]) -> None:
        for split, entry in manifest["splits"].items():
            dataset = KDDataset(read_manifest(root), split, seq_length=48)
            row = 0
            for shard in entry["shards"]:
                own = [annotated(len(dataset[row + n].tokens), row + n, declared) for n in range(shard["rows"])]
                for annotation in declared:
                    arrays = [document.annotations[annotation.name] for document in own]
                    shard["files"] |= write_annotation(root / split, shard["name"], annotation, arrays)
                documents.extend(own if split == "train" else [])
                row += len(own)
        manifest["annotations"] = [annotation.model_dump() for annotation in declared]

    rewrite_manifest(root, annotate)
    return root, documents


def test_sidecars_come_back_with_their_documents_and_in_batches(tmp_path: Path) -> None:
    root, documents = annotated_dataset(tmp_path / "set")
    plain = read_manifest(small_dataset(tmp_path / "plain", train=12, valid=4))
    manifest = read_manifest(root)
    assert manifest.annotations == ALL and plain.annotations == () and manifest.sha256 != plain.sha256
    dataset = KDDataset(manifest, "train", seq_length=48)
    for index, expected in enumerate(documents):
        for annotation in ALL:
            stored = dataset[index].annotations[annotation.name]
            assert stored.dtype == annotation.dtype and np.array_equal(stored, expected.annotations[annotation.name])
    cfg = tiny_config(global_batch_size=2, micro_batch_size=2)
    source = StoredSource([Part("kd", dataset)], cfg, 0, 1)
    assert source.annotations == ALL
    (batch,) = source.next_step().batches
    assert set(batch.annotations) == {annotation.name for annotation in ALL}
    assert (batch.per_token("reward")[batch.document_id >= 0] >= 1).all()
    mixed = StoredSource([Part("kd", dataset), Part("plain", KDDataset(plain, "train", seq_length=48))], cfg, 0, 1)
    assert mixed.annotations == ()
    assert StoredSource([Part("kd", dataset)], cfg, 0, 1, (LOG_P,)).annotations == (LOG_P,)


def test_in_a_blend_a_dataset_that_was_not_scored_has_no_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And records are expanded where a batch carries them, nowhere else."""
    told = TeacherRecords(count=3, vocab_size=PADDED_VOCAB, coding="exact")
    scored, plain = (small_dataset(tmp_path / name, train=12, valid=4) for name in ("scored", "plain"))

    def score(manifest: dict[str, Any]) -> None:
        for split, entry in manifest["splits"].items():
            dataset, row = KDDataset(read_manifest(scored), split, seq_length=48), 0
            for shard in entry["shards"]:
                arrays = []
                for number in range(row, row + shard["rows"]):
                    count = int(dataset[number].loss_mask.sum())
                    ids = np.tile(np.arange(3, dtype=np.int32), (count, 1))
                    records = ids, np.full((count, 3), -2.0, np.float32), np.full(count, -2.0, np.float32)
                    arrays.append(told.encode(records))
                shard["files"] |= write_annotation(scored / split, shard["name"], told.stored, arrays)
                row += shard["rows"]
        manifest["teacher"] = told.model_dump()

    rewrite_manifest(scored, score)
    listed = ", ".join(f"{{path: {root}, weight: 1}}" for root in (plain, scored))
    cfg = tiny_config(data_path=None, blend=f"[{listed}]", global_batch_size=4, micro_batch_size=4)
    parts = open_parts(cfg, "train")
    for valid in open_parts(cfg, "valid"):  # each alone, and alike
        assert ValidSource(valid, cfg, 0, 1).annotations == told.annotations
    source, bare = (StoredSource(parts, cfg, 0, 1, wanted) for wanted in (None, ()))
    assert source.annotations == told.annotations and bare.annotations == ()
    (batch,) = source.next_step().batches
    recorded = (batch.annotations["teacher_ids"][..., 0] != NO_RECORD) & batch.loss_mask
    by_row = [
        (bool(has.all()), bool(has.any())) for has in (r[m] for r, m in zip(recorded, batch.loss_mask, strict=True))
    ]
    assert sorted(by_row) == [(False, False)] * 2 + [(True, True)] * 2
    monkeypatch.setattr(TeacherRecords, "decode", None)
    bare.next_step()
    with pytest.raises(TypeError):
        source.next_step()


@pytest.mark.parametrize("declared", [{"dtype": "int64"}, {"width": 2}, {"width": None}, {"name": "others_ids"}])
def test_a_sidecar_that_is_not_as_declared_is_refused_on_opening(tmp_path: Path, declared: dict[str, Any]) -> None:
    root, _ = annotated_dataset(tmp_path / "set", [IDS])
    rewrite_manifest(root, lambda manifest: manifest["annotations"][0].update(declared))
    with pytest.raises(DataError, match=r"teacher_ids|others_ids"):
        KDDataset(read_manifest(root), "train", seq_length=48)


def test_a_shards_own_parts_are_no_annotations() -> None:
    with pytest.raises(ValidationError):
        Annotation(name="span", dtype="uint8")
