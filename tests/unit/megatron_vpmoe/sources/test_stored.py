"""Batch sources: the same global order for any number of ranks, any micro-batch size, and from any cursor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.data.batch import Batch, Document
from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.data.cursor import SampleOrder
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import ConfigError, DataError
from megatron_vpmoe.sources import Ahead, Position, StoredSource, ValidSource
from tests.fixtures_dataset import PADDED_VOCAB, small_dataset
from tests.tiny import tiny_config

SEQ_LENGTH = 48


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("kd"), train=40, valid=10, seq_length=SEQ_LENGTH)


def opened(root: Path, split: str) -> KDDataset:
    return KDDataset.open(root, split, seq_length=SEQ_LENGTH, padded_vocab_size=PADDED_VOCAB)


def parts(root: Path) -> list[Part]:
    return [Part("kd", opened(root, "train"))]


def config(global_batch_size: int, micro_batch_size: int, **changes):
    return tiny_config(
        global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, packing_window=16, **changes
    )


def rows_by_sample(batches: list[Batch]) -> dict[int, list[list[int]]]:
    """Sample id -> everything that the row holds."""
    fields = ("tokens", "labels", "position_ids", "document_id", "loss_mask", "span_id")
    return {
        sample: [getattr(batch, field)[row].tolist() for field in fields]
        for batch in batches
        for row, sample in enumerate(batch.sample_ids)
    }


def global_step(root: Path, consumed: int, gbs: int, mbs: int, dp_size: int) -> dict[int, list[list[int]]]:
    """What all ranks together see in one step."""
    rows: dict[int, list[list[int]]] = {}
    for rank in range(dp_size):
        source = StoredSource(parts(root), config(gbs, mbs), rank, dp_size)
        source.consumed_samples = consumed
        batches = source.next_step().batches
        assert len(batches) == gbs // mbs // dp_size
        assert all(batch.tokens.shape == (mbs, SEQ_LENGTH) for batch in batches)
        mine = rows_by_sample(batches)
        assert not rows.keys() & mine.keys()
        rows |= mine
    return rows


@pytest.mark.slow
@settings(max_examples=25)
@given(
    consumed=st.integers(0, 120),
    split=st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2), (12, 1), (1, 12), (6, 2), (4, 3)]),
)
def test_any_split_from_any_cursor_gives_the_same_global_batch(dataset_root, consumed, split):
    mbs, dp_size = split
    rows = global_step(dataset_root, consumed, 12, mbs, dp_size)
    assert sorted(rows) == list(range(consumed, consumed + 12))
    assert rows == global_step(dataset_root, consumed, 12, 12, 1)


def test_a_run_resumed_at_another_size_goes_on_in_the_same_order(dataset_root):
    straight = {}
    source = StoredSource(parts(dataset_root), config(6, 6), 0, 1)
    for step in range(12):
        assert source.consumed_samples == 6 * step
        straight |= rows_by_sample(source.next_step().batches)
    resumed = {}
    for step in range(5):
        resumed |= global_step(dataset_root, 6 * step, 6, 3, 2)
    for step in range(5, 12):
        resumed |= global_step(dataset_root, 6 * step, 6, 2, 3)
    assert resumed == straight


def test_preparing_ahead_changes_nothing(dataset_root):
    source = Ahead(StoredSource(parts(dataset_root), config(4, 2), 0, 1))
    for begin, steps in ((0, 3), (0, 1), (40, 2)):
        source.resume(Position(begin, []), source="test")
        for consumed in range(begin, begin + 4 * steps, 4):
            step = source.next_step()
            assert step.position().consumed_samples == consumed + 4
            assert rows_by_sample(step.batches) == global_step(dataset_root, consumed, 4, 2, 1)
    source.close()


def test_a_fault_while_preparing_ahead_reaches_the_step_it_belongs_to(dataset_root, monkeypatch):
    dataset, cfg = opened(dataset_root, "train"), config(4, 2)
    order = SampleOrder(dataset.lengths, seq_length=SEQ_LENGTH, window=16, seed=cfg.data.data_seed)
    broken = {int(index) for sample in range(4, 8) for index in order.documents(sample)}
    reading = KDDataset.__getitem__

    def damaged(self: KDDataset, index: int) -> Document:
        if index in broken:
            raise DataError("unreadable", source="shard_00", remedy="none")
        return reading(self, index)

    monkeypatch.setattr(KDDataset, "__getitem__", damaged)
    source = Ahead(StoredSource([Part("kd", dataset)], cfg, 0, 1))
    assert source.next_step().batches[0].sample_ids == [0, 1]
    with pytest.raises(DataError, match="unreadable"):
        source.next_step()
    broken.clear()
    assert source.next_step().batches[0].sample_ids == [4, 5]
    source.close()


def test_close_ends_the_thread(dataset_root):
    source = Ahead(StoredSource(parts(dataset_root), config(4, 2), 0, 1))
    source.next_step()
    source.close()
    source.close()
    assert not any(thread.is_alive() for thread in source._worker._threads)


def test_epoch_follows_the_cursor(dataset_root):
    dataset, cfg = opened(dataset_root, "train"), config(4, 2)
    order = SampleOrder(dataset.lengths, seq_length=SEQ_LENGTH, window=16, seed=cfg.data.data_seed)
    second = order.first_sample_of_epoch(1)
    source = StoredSource([Part("kd", dataset)], cfg, 0, 1)
    cursors = [source.position(consumed).data[0] for consumed in (0, second - 1, second)]
    assert [(cursor["samples"], cursor["epoch"]) for cursor in cursors] == [(0, 0), (second - 1, 0), (second, 1)]
    source.consumed_samples = second - 4
    assert source.next_step().metrics == {"data/kd/samples": second, "data/kd/epoch": 1}


def test_a_batch_that_does_not_divide_is_refused(dataset_root):
    with pytest.raises(ConfigError, match="global_batch_size 10 is not a multiple of micro_batch_size 2 x 3"):
        StoredSource(parts(dataset_root), config(10, 2), 0, 3)


@pytest.mark.parametrize(("mbs", "dp_size"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (2, 3), (16, 4)])
def test_validation_covers_the_split_once_with_equal_work_on_every_rank(dataset_root, mbs, dp_size):
    dataset = opened(dataset_root, "valid")
    seen: list[int] = []
    forwards = set()
    tokens = 0
    for rank in range(dp_size):
        source = ValidSource(Part("kd", dataset), config(mbs * dp_size, mbs, eval_iters=1000), rank, dp_size)
        batches = list(source)
        assert len(batches) == len(source)
        forwards.add(len(batches))
        seen += [sample for batch in batches for sample in batch.sample_ids if sample >= 0]
        tokens += sum(batch.real_tokens for batch in batches)
        filler = [batch.loss_mask[row] for batch in batches for row, s in enumerate(batch.sample_ids) if s < 0]
        assert not any(mask.any() for mask in filler)
    assert len(forwards) == 1
    assert sorted(seen) == list(range(source.samples))
    assert tokens == dataset.lengths.sum()


def test_validation_repeats_itself_and_stops_after_eval_iters(dataset_root):
    dataset = opened(dataset_root, "valid")
    whole = ValidSource(Part("kd", dataset), config(2, 1, eval_iters=1000), 0, 1)
    first, second = list(whole), list(whole)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))
    short = ValidSource(Part("kd", dataset), config(2, 1, eval_iters=2), 0, 1)
    assert [batch.sample_ids for batch in short] == [[0], [1], [2], [3]]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, short, strict=False))


def test_batches_for_a_gpu_are_pinned_and_copied_without_waiting(dataset_root, monkeypatch):
    pinned: set[int] = set()
    copies: list[tuple[bool, dict[str, object]]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        return copy

    def to(tensor: torch.Tensor, _device: object, **how: object) -> torch.Tensor:
        copies.append((tensor.data_ptr() in pinned, how))
        return tensor

    plain = global_step(dataset_root, 0, 4, 2, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    source, valid = (
        cls(parts(dataset_root)[0] if cls is ValidSource else parts(dataset_root), config(4, 2), 0, 1)
        for cls in (StoredSource, ValidSource)
    )
    batches = source.next_step().batches
    assert rows_by_sample(batches) == plain
    monkeypatch.setattr(torch.Tensor, "to", to)
    for batch in [*batches, *valid]:
        batch.to("cuda")
    assert len(copies) >= 18
    assert all(was_pinned and how == {"non_blocking": True} for was_pinned, how in copies)
