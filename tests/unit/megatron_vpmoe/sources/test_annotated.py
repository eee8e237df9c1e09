"""A frozen model's annotations: the same numbers live, before an update, and stored in sidecars ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.sources import Annotated, AnnotatedBatches, Position, Reference, StoredSource, ValidSource
from megatron_vpmoe.sources.annotated import of_documents
from tests.fixtures_dataset import rewrite_manifest, small_dataset, write_annotation
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


def stored_ahead(root: Path, reference: Reference) -> None:
    """What ``reference`` says of every document, as sidecars of the dataset, made in batches of three rows."""
    (declared,) = reference.annotations

    def annotate(manifest: dict[str, Any]) -> None:
        for split, entry in manifest["splits"].items():
            dataset, row = KDDataset(read_manifest(root), split, seq_length=48), 0
            for shard in entry["shards"]:
                documents = [dataset[row + number] for number in range(shard["rows"])]
                lists = of_documents(documents, reference, eod_id=dataset.eod_id, seq_length=48, rows=3)
                arrays = [found[declared.name] for batch in lists for found in batch]
                shard["files"] |= write_annotation(root / split, shard["name"], declared, arrays)
                row += len(documents)
        manifest["annotations"] = [declared.model_dump()]

    rewrite_manifest(root, annotate)


def test_live_and_stored_are_the_same_numbers(tmp_path: Path) -> None:
    cfg = tiny_config(global_batch_size=4, micro_batch_size=2, num_layers=2)
    model, reference = build_model(cfg), Reference()
    reference.open(model)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    plain, ahead = (small_dataset(tmp_path / name, train=16, valid=6) for name in ("plain", "ahead"))
    stored_ahead(ahead, reference)
    opened = [
        [Part("kd", KDDataset(read_manifest(root), split, seq_length=48)) for split in ("train", "valid")]
        for root in (plain, ahead)
    ]
    live = Annotated(StoredSource([opened[0][0]], cfg, 0, 1), reference)
    with pytest.raises(ConfigError, match="the data bring reference_log_p already"):
        Annotated(StoredSource([opened[1][0]], cfg, 0, 1), reference)
    stored = StoredSource([opened[1][0]], cfg, 0, 1)
    assert live.annotations == stored.annotations == reference.annotations
    for source in (live, stored):
        source.resume(Position(4, []), source="test")
    one, other = live.next_step(), stored.next_step()
    valid = AnnotatedBatches(ValidSource(opened[0][1], cfg, 0, 1), reference), ValidSource(opened[1][1], cfg, 0, 1)
    pairs = [*zip(one.batches, other.batches, strict=True), *zip(*valid, strict=True)]
    assert len(pairs) > 2
    for mine, theirs in pairs:
        assert torch.equal(mine.tokens, theirs.tokens) and mine.loss_mask.any()
        values = mine.annotations["reference_log_p"]
        torch.testing.assert_close(values, theirs.annotations["reference_log_p"], rtol=1e-5, atol=1e-5)
        assert not values[~mine.loss_mask].any() and (values[mine.loss_mask] < 0).all()
        logits = model(mine.tokens, SequenceLayout(mine.document_id, mine.position_ids)).logits()
        plainly = logits.float().log_softmax(-1).gather(-1, mine.labels.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(values[mine.loss_mask], plainly[mine.loss_mask], rtol=1e-5, atol=1e-5)


def test_a_reference_without_a_model_says_so() -> None:
    with pytest.raises(RuntimeError, match="no model yet"):
        Reference()(None)  # type: ignore[arg-type]
