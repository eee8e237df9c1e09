"""Blends: several datasets as one global order, its cursors, and what a resume checks of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.data.blend import Part, open_parts
from megatron_vpmoe.data.cursor import SampleOrder
from megatron_vpmoe.data.mixture import Mixture
from megatron_vpmoe.errors import CheckpointError, DataError
from megatron_vpmoe.sources import Position, StoredSource, ValidSource
from megatron_vpmoe.sources.stored import weights_of
from tests.conftest import fuzz_settings
from tests.fixtures_dataset import rewrite_manifest, small_dataset
from tests.tiny import tiny_config

SIZES = {"sums": 40, "facts": 90, "prose": 23}
SCHEDULE = "[{from_sample: 30, weights: [1, 1, 2]}, {from_sample: 77, weights: [0, 3, 1]}]"


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("blend")
    return [small_dataset(folder / name, train=size) for name, size in SIZES.items()]


def config(roots: list[Path], gbs: int = 12, mbs: int = 12, schedule: str = SCHEDULE, **changes):
    listed = ", ".join(f"{{path: {root}, weight: {w}}}" for root, w in zip(roots, (0.5, 0.3, 0.2), strict=False))
    return tiny_config(
        data_path=None, blend=f"[{listed}]", blend_schedule=schedule, packing_window=16, global_batch_size=gbs,
        micro_batch_size=mbs, **changes,
    )  # fmt: skip


def rows(source: StoredSource, consumed: int) -> dict[int, list[int]]:
    source.consumed_samples = consumed
    return {
        sample: batch.tokens[row].tolist()
        for batch in source.next_step().batches
        for row, sample in enumerate(batch.sample_ids)
    }


@settings(max_examples=30)
@given(consumed=st.integers(0, 200), split=st.sampled_from([(1, 1), (3, 2), (1, 12), (2, 3), (6, 1)]))
@pytest.mark.slow
def test_any_cursor_and_any_number_of_ranks_continue_the_same_order(roots, consumed, split):
    mbs, dp_size = split
    cfg = config(roots, mbs=mbs)
    seen: dict[int, list[int]] = {}
    for rank in range(dp_size):
        source = StoredSource(open_parts(cfg, "train"), cfg, rank, dp_size)
        seen |= rows(source, consumed)
    assert seen == straight(roots, consumed)


def straight(roots: list[Path], consumed: int) -> dict[int, list[int]]:
    """The samples from ``consumed`` on of a run that starts at 0 in steps of one."""
    cfg = config(roots, gbs=1, mbs=1)
    if not STRAIGHT:
        source = StoredSource(open_parts(cfg, "train"), cfg, 0, 1)
        for sample in range(220):
            STRAIGHT.update(rows(source, sample))
    return {sample: STRAIGHT[sample] for sample in range(consumed, consumed + 12)}


STRAIGHT: dict[int, list[int]] = {}


@pytest.mark.slow
@settings(max_examples=30)
@given(consumed=st.integers(0, 400), gbs=st.sampled_from([1, 4, 12]))
def test_a_stored_cursor_resumes_the_order_and_is_what_packing_again_finds(roots, consumed, gbs):
    cfg = config(roots, gbs=gbs, mbs=1)
    first, again = (StoredSource(open_parts(cfg, "train"), cfg, 0, 1) for _ in range(2))
    first.consumed_samples, position = consumed, consumed + gbs
    stored = first.next_step().position().data
    assert stored == first.position(position).data
    assert again.resume(Position(position, stored), source="checkpoint") == []
    assert again.position(position).data == stored
    for order, cursor in zip(again._rows.blend._orders, stored, strict=True):
        assert order._first_sample[0] == cursor["window_first_sample"]  # nothing before it was packed
    recounted = StoredSource(open_parts(cfg, "train"), cfg, 0, 1)
    assert recounted.position(position).data == stored
    assert rows(again, position) == rows(first, position) == rows(recounted, position)


def test_a_dataset_keeps_the_order_that_it_has_alone(roots):
    cfg = config(roots, schedule="null")
    alone = tiny_config(data_path=roots[1], packing_window=16, global_batch_size=1, micro_batch_size=1)
    blend = StoredSource(open_parts(cfg, "train"), cfg, 0, 1)
    single = StoredSource(open_parts(alone, "train"), alone, 0, 1)
    mixture = Mixture(weights_of(cfg))
    mine = [s for s in range(48) if mixture.place(s)[0] == 1]
    taken = {s: row for consumed in range(0, 48, 12) for s, row in rows(blend, consumed).items()}
    assert [taken[s] for s in mine] == [rows(single, own)[own] for own in range(len(mine))]


@fuzz_settings(6)
@given(skips=st.tuples(*[st.integers(0, 40)] * 3), consumed=st.integers(0, 60))
def test_rows_passed_over_come_not_and_what_follows_is_the_same(roots, skips, consumed):
    """Also over the end of an epoch, and resumed."""
    whole, later, resumed = (
        StoredSource(open_parts(cfg, "train"), cfg, 0, 1)
        for cfg in (config(roots), *[config(roots, skip_rows=list(skips))] * 2)
    )
    first, second = whole._rows.blend, later._rows.blend
    mixture = Mixture(weights_of(config(roots)))
    stored = later.position(consumed).data
    assert resumed.resume(Position(consumed, stored), source="checkpoint") == []
    for sample in range(consumed, consumed + 4):
        part, own = mixture.place(sample)
        indices = first._orders[part].documents(skips[part] + own)
        expected = [first.parts[part].dataset[int(index)].tokens.tolist() for index in indices]
        for blend in (second, resumed._rows.blend):
            assert [document.tokens.tolist() for document in blend.documents(sample)] == expected
    assert [cursor["samples"] for cursor in stored] == mixture.counts(consumed)
    valid = [part.skip for part in open_parts(config(roots, skip_rows=list(skips)), "valid")]
    assert valid == [0, 0, 0], "every validation is of the same rows"


def test_each_dataset_gives_all_its_conversations_once_an_epoch(roots):
    parts = open_parts(config(roots), "train")
    order = SampleOrder(parts[2].dataset.lengths, seq_length=48, window=16, seed=1234)
    end = order.first_sample_of_epoch(1)
    seen = Counter(int(index) for sample in range(end) for index in order.documents(sample))
    assert seen == Counter(range(SIZES["prose"]))


def test_cursors_of_other_weights_are_refused_or_noted(roots):
    cfg, other = config(roots), config(roots, schedule="null")
    source = StoredSource(open_parts(cfg, "train"), cfg, 0, 1)
    stored = source.position(60).data
    changed = StoredSource(open_parts(other, "train"), other, 0, 1)
    with pytest.raises(CheckpointError, match=r"60 samples under these weights are sums 30, facts 18, prose 12"):
        changed.resume(Position(60, stored), source="checkpoint")
    assert "the checkpoint has" in changed.resume(Position(60, stored), source="checkpoint", allow_change=True)[0]
    assert changed.position(60).data[0]["samples"] == 30


def test_a_later_stage_may_change_while_the_past_stays(roots):
    cfg = config(roots)
    later = config(roots, schedule="[{from_sample: 30, weights: [1, 1, 2]}, {from_sample: 60, weights: [9, 1, 1]}]")
    before = StoredSource(open_parts(cfg, "train"), cfg, 0, 1)
    after = StoredSource(open_parts(later, "train"), later, 0, 1)
    assert after.resume(Position(48, before.position(48).data), source="checkpoint") == []


def test_a_cursor_that_contradicts_its_dataset_is_refused(roots):
    cfg = config(roots)
    source = StoredSource(open_parts(cfg, "train"), cfg, 0, 1)
    stored = source.position(60).data
    stored[1]["window_first_sample"] -= 9
    with pytest.raises(CheckpointError, match="the cursor of facts contradicts its dataset"):
        source.resume(Position(60, stored), source="checkpoint")


@pytest.mark.parametrize("stored", [[1], {"facts": 3}, None, [{"name": "facts"}], [{"samples": [60]}]])
def test_what_is_no_list_of_cursors_is_refused(roots, stored):
    cfg = config(roots)
    source = StoredSource(open_parts(cfg, "train"), cfg, 0, 1)
    with pytest.raises(CheckpointError, match="these are no cursors"):
        source.resume(Position(60, stored), source="checkpoint")


def test_an_order_of_other_settings_is_packed_again(roots):
    cfg, other = config(roots), config(roots, data_seed=5)
    source, changed = (StoredSource(open_parts(c, "train"), c, 0, 1) for c in (cfg, other))
    notes = changed.resume(Position(60, source.position(60).data), source="checkpoint")
    assert len(notes) == 3 and all("packing the rows behind the cursor again" in note for note in notes)
    assert sum(cursor["samples"] for cursor in changed.position(60).data) == 60


def test_datasets_of_two_vocabularies_are_refused_naming_both(tmp_path):
    roots = [small_dataset(tmp_path / name) for name in ("a", "b")]
    rewrite_manifest(roots[1], lambda m: m["tokenizer"].update(rank_file_sha256="f" * 64))
    with pytest.raises(DataError, match="rank_file_sha256") as caught:
        open_parts(config(roots, schedule="null"), "train")
    assert str(roots[0]) in str(caught.value) and str(roots[1]) in str(caught.value)


def test_every_dataset_has_its_own_validation(roots):
    cfg = config(roots, gbs=2, mbs=1, eval_iters=1000)
    for part in open_parts(cfg, "valid"):
        assert isinstance(part, Part)
        real = sum(batch.real_tokens for batch in ValidSource(part, cfg, 0, 1))
        assert real == part.dataset.lengths.sum()
