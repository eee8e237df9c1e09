"""The layout of buffers: each unit whole in one rank's slice, nothing twice, little padding."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.config.slices import ALIGNMENT, Bucket, Units, plan_buckets, starts

SHAPES = st.lists(st.integers(1, 12), max_size=2).map(tuple)
PARAMS = st.lists(st.builds(Units, st.sampled_from([1, 1, 2, 7, 16]), SHAPES), min_size=1, max_size=24)
RANKS, TARGET = st.integers(1, 9), st.sampled_from([1, 300, 5000])


def holders(bucket: Bucket, params: list[Units]) -> dict[tuple[int, int], int]:
    """(parameter, unit) -> the rank in whose slice it lies whole."""
    found = {}
    for index, offset in bucket.places:
        for unit in range(params[index].count):
            begin = offset + unit * params[index].size
            inside = [
                rank
                for rank, (low, high) in enumerate(pairwise(bucket.cuts))
                if low <= begin and begin + params[index].size <= high
            ]
            assert len(inside) == 1, (index, unit)
            found[index, unit] = inside[0]
    return found


@given(params=PARAMS, ranks=RANKS, target=TARGET)
def test_every_unit_lies_whole_in_one_slice(params: list[Units], ranks: int, target: int) -> None:
    buckets = plan_buckets(params, ranks, target)
    held = [pair for bucket in buckets for pair in holders(bucket, params)]
    assert sorted(held) == [(index, unit) for index, param in enumerate(params) for unit in range(param.count)]
    for begin, bucket in zip(starts(buckets, ranks), buckets, strict=False):
        spans = sorted((offset, offset + params[index].elements) for index, offset in bucket.places)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        assert bucket.cuts[0] == 0 and bucket.cuts[-1] <= bucket.size and bucket.size % ranks == 0
        if bucket.even:
            assert {high - low for low, high in pairwise(bucket.cuts)} == {bucket.size // ranks}
        else:
            assert spans[-1][1] <= bucket.cuts[-1]
        assert (begin % ALIGNMENT, begin % ranks) == (0, 0)
        assert not any((begin + offset) % ALIGNMENT for _, offset in bucket.places)


@given(params=PARAMS, ranks=RANKS, target=TARGET)
def test_padding_is_bounded(params: list[Units], ranks: int, target: int) -> None:
    """Twice the aligned elements at the most where slices are equal; else what aligns parameters and the end."""
    for bucket in plan_buckets(params, ranks, target):
        aligned = sum(-(-params[index].elements // ALIGNMENT) * ALIGNMENT for index, _ in bucket.places)
        assert bucket.elements == sum(params[index].elements for index, _ in bucket.places)
        assert bucket.size <= (2 * aligned if bucket.even else aligned + ALIGNMENT * ranks)


@given(params=PARAMS, ranks=RANKS, target=TARGET)
def test_the_order_is_the_backward_passes(params: list[Units], ranks: int, target: int) -> None:
    ready = [bucket.ready for bucket in plan_buckets(params, ranks, target)]
    assert ready == sorted(ready, reverse=True)


def test_stages_divide_their_copies_alike() -> None:
    """A tied embedding has the same slices whatever lies around it."""
    embedding, matrix = Units(100, (16,), alone=True), Units(1, (8, 8))
    for params in ([embedding, matrix, Units(4, (16,))], [matrix, matrix, embedding], [embedding]):
        at = params.index(embedding)
        (alone,) = [bucket for bucket in plan_buckets(params, 4, 10**6) if (at, 0) in bucket.places]
        assert alone.cuts == (0, 400, 800, 1200, 1600) and len(alone.places) == 1


@pytest.mark.parametrize("ranks", [1, 8, 64, 512, 1024])
def test_stacks_of_experts_are_cut_without_padding(ranks: int) -> None:
    """256 experts a layer; a rank has at least one of a bucket."""
    first, second = Units(256, (128, 1024)), Units(256, (1024, 128))
    buckets = plan_buckets([first, second] * 8, ranks, first.elements)
    assert sum(bucket.size for bucket in buckets) == 16 * first.elements
    assert len(buckets) == 16 // max(1, ranks // 256)


def test_units_of_one_shape_are_side_by_side() -> None:
    """A bucket has units of one size, and one run of each shape: no small ones shift the slices' borders."""
    params = [Units(16, (4, 8)), Units(16, (8, 4)), Units(16, (8,)), Units(16, (4,))] * 3
    buckets = plan_buckets(params, 2, 10**6)
    shapes = [[params[index].shape for index, _ in bucket.places] for bucket in buckets]
    assert sorted(len(set(of_bucket)) for of_bucket in shapes) == [1, 1, 2]
    assert all(sum(a != b for a, b in pairwise(of_bucket)) == len(set(of_bucket)) - 1 for of_bucket in shapes)


def test_more_ranks_than_matrices_are_not_padded() -> None:
    """Slices are unequal then, and the first rank's is not empty."""
    params = [Units(1, (64, 64)), Units(1, (64, 16)), Units(1, (64,))]
    (bucket,) = plan_buckets(params, 32, 10)
    assert not bucket.even and bucket.size <= sum(p.elements for p in params) + 32 * ALIGNMENT
    assert holders(bucket, params)[0, 0] == 0
