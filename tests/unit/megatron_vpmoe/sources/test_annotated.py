"""A frozen model's annotations: the same numbers live, before an update, and stored in sidecars ahead of time."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from megatron_vpmoe.annotation import NO_RECORD
from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.sources import Annotated, AnnotatedBatches, Position, Reference, StoredSource, Teacher, ValidSource
from megatron_vpmoe.sources.annotated import of_documents
from tests.fixtures_dataset import small_dataset, stored_ahead
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


ANNOTATORS = {"reference": Reference, "teacher": lambda: Teacher(5, 2.0)}


@pytest.mark.parametrize("name", ANNOTATORS)
def test_live_and_stored_are_the_same_numbers(name: str, tmp_path: Path) -> None:
    cfg = tiny_config(global_batch_size=4, micro_batch_size=2, num_layers=2)
    model, frozen = build_model(cfg), ANNOTATORS[name]()
    frozen.open(model)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    plain, ahead = (small_dataset(tmp_path / name, train=16, valid=6) for name in ("plain", "ahead"))
    how = {"eod_id": read_manifest(ahead).tokenizer.eod_id, "seq_length": 48, "rows": 3}
    stored_ahead(ahead, frozen.annotations, lambda docs: chain.from_iterable(of_documents(docs, frozen, **how)))
    opened = [
        [Part("kd", KDDataset(read_manifest(root), split, seq_length=48)) for split in ("train", "valid")]
        for root in (plain, ahead)
    ]
    live = Annotated(StoredSource([opened[0][0]], cfg, 0, 1), frozen)
    with pytest.raises(ConfigError, match=f"the data bring .*{name}_.* already"):
        Annotated(StoredSource([opened[1][0]], cfg, 0, 1), frozen)
    stored = StoredSource([opened[1][0]], cfg, 0, 1)
    assert live.annotations == stored.annotations == frozen.annotations
    for source in (live, stored):
        source.resume(Position(4, []), source="test")
    one, other = live.next_step(), stored.next_step()
    valid = AnnotatedBatches(ValidSource(opened[0][1], cfg, 0, 1), frozen), ValidSource(opened[1][1], cfg, 0, 1)
    pairs = [*zip(one.batches, other.batches, strict=True), *zip(*valid, strict=True)]
    assert len(pairs) > 2
    for mine, theirs in pairs:
        assert torch.equal(mine.tokens, theirs.tokens) and mine.loss_mask.any()
        mask, logits = mine.loss_mask, model(mine.tokens, SequenceLayout(mine.document_id, mine.position_ids)).logits()
        log_p = (logits.double() / (2.0 if name == "teacher" else 1.0)).log_softmax(-1)
        of_label = log_p.gather(-1, mine.labels.unsqueeze(-1)).squeeze(-1)
        expected = dict(zip(["teacher_log_p", "teacher_ids"], log_p.topk(5), strict=True))
        expected |= {"reference_log_p": of_label, "teacher_label_log_p": of_label}
        for declared in frozen.annotations:
            values, ahead_of = (batch.annotations[declared.name] for batch in (mine, theirs))
            for found in (values, ahead_of):
                torch.testing.assert_close(
                    found[mask], expected[declared.name][mask], rtol=1e-5, atol=1e-5, check_dtype=False
                )
            assert (values[~mask] == (NO_RECORD if declared.name == "teacher_ids" else 0)).all()


def test_a_reference_without_a_model_says_so() -> None:
    with pytest.raises(RuntimeError, match="no model yet"):
        Reference()(None)  # type: ignore[arg-type]
