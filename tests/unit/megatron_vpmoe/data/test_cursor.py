"""The global order: each epoch shows every conversation once, and any place in it can be asked for directly."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vpmoe.data.cursor import SampleOrder, Shuffle, shuffled

LENGTHS = np.random.default_rng(3).integers(8, 60, 300).astype(np.int32)


def order(seed: int = 5, window: int = 64) -> SampleOrder:
    return SampleOrder(LENGTHS, seq_length=64, window=window, seed=seed)


def read(source: SampleOrder, begin: int, end: int) -> list[list[int]]:
    return [source.documents(sample).tolist() for sample in range(begin, end)]


@pytest.mark.parametrize("window", [64, 100, 300, 4096])
def test_an_epoch_holds_every_conversation_once(window):
    source = order(window=window)
    for epoch in range(3):
        begin, end = source.first_sample_of_epoch(epoch), source.first_sample_of_epoch(epoch + 1)
        rows = read(source, begin, end)
        assert sorted(index for row in rows for index in row) == list(range(300))
        assert all(LENGTHS[row].sum() <= 64 for row in rows)
        assert {source.epoch_of(source.start_of(sample)) for sample in range(begin, end)} == {epoch}


def test_any_sample_can_be_asked_for_first_and_in_any_sequence():
    straight = read(order(), 0, 600)
    jumping = order()
    for sample in (599, 0, 301, 300, 17, 598):
        assert jumping.documents(sample).tolist() == straight[sample]


def test_epochs_and_seeds_differ():
    source = order()
    rows = source.first_sample_of_epoch(1)
    assert read(source, 0, 20) != read(source, rows, rows + 20)
    assert read(order(seed=5), 0, 20) != read(order(seed=6), 0, 20)


def test_long_conversations_do_not_come_first():
    source = order(window=300)
    rows = source.first_sample_of_epoch(1)
    longest = [max(LENGTHS[row]) for row in read(source, 0, rows)]
    half = rows // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 6


def test_the_order_is_the_same_on_every_machine():
    # A golden value: another numpy or Python must not change what a resumed run sees.
    assert shuffled(10, 1234, 0).tolist() == GOLDEN_PERMUTATION
    assert read(order(), 0, 4) == GOLDEN_ROWS


@pytest.mark.parametrize("count", [1, 2, 300, 200_001])
def test_a_stretch_of_a_shuffle_is_part_of_the_whole(count: int):
    shuffle, whole = Shuffle(count, 5, 3), shuffled(count, 5, 3)
    assert sorted(whole.tolist()) == list(range(count))
    for begin in range(0, count, max(1, count // 7)):
        end = min(count, begin + 4096)
        assert shuffle.between(begin, end).tolist() == whole[begin:end].tolist()


def test_an_order_goes_on_from_a_noted_window_without_packing_what_is_behind():
    straight, resumed = order(), order()
    for sample in (0, 17, 299, 300, 599):
        start = straight.start_of(sample)
        resumed.go_to(start, sample)
        assert resumed._first_sample == [start.first_sample]
        assert resumed.documents(sample).tolist() == straight.documents(sample).tolist()
        assert resumed.start_of(sample) == start
    assert read(resumed, 0, 20) == read(straight, 0, 20)  # back before the noted window
    with pytest.raises(ValueError, match="not 599"):
        resumed.go_to(straight.start_of(0), 599)


def test_shuffled_is_a_uniform_looking_permutation():
    many = np.stack([shuffled(5, seed) for seed in range(5000)])
    assert (np.sort(many, axis=1) == np.arange(5)).all()
    shares = np.stack([(many == value).mean(axis=0) for value in range(5)])
    assert np.abs(shares - 0.2).max() < 0.03


GOLDEN_PERMUTATION = [9, 2, 7, 6, 1, 3, 0, 8, 5, 4]
GOLDEN_ROWS = [[138], [30, 184], [191, 256], [160, 260]]
