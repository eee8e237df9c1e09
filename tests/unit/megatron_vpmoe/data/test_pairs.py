"""Groups of documents that share a row: lengths summed, order kept, identity for groups of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.data.packing import fit_companion_minimum, pack
from megatron_vpmoe.data.pairs import documents_of, grouped_lengths
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import read_manifest
from tests.fixtures_dataset import rewrite_manifest, small_dataset

CAPACITY = 64
LENGTHS = st.lists(st.integers(2, CAPACITY // 2), min_size=2, max_size=80).map(lambda v: v[: len(v) // 2 * 2])


def test_pairs_are_summed_and_laid_out_chosen_first():
    assert grouped_lengths(np.array([3, 5, 10, 2], np.int32), 2, seq_length=12).tolist() == [8, 12]
    assert documents_of(np.array([2, 0]), 2).tolist() == [4, 5, 0, 1]


@given(LENGTHS)
@settings(max_examples=30)
def test_packed_pairs_share_a_row_side_by_side(values: list[int]):
    lengths = np.array(values, np.int32)
    pairs = grouped_lengths(lengths, 2, seq_length=CAPACITY)
    seen: list[int] = []
    for row in pack(pairs, CAPACITY, companion_minimum=fit_companion_minimum(pairs, CAPACITY)):
        documents = documents_of(np.array(row), 2)
        assert lengths[documents].sum() <= CAPACITY
        assert (documents[0::2] % 2 == 0).all() and (documents[1::2] == documents[0::2] + 1).all()
        seen += documents.tolist()
    assert sorted(seen) == list(range(len(lengths)))


@given(LENGTHS)
@settings(max_examples=20)
def test_groups_of_one_change_nothing(values: list[int]):
    lengths = np.array(values, np.int32)
    assert np.array_equal(grouped_lengths(lengths, 1, seq_length=CAPACITY), lengths)
    assert np.array_equal(documents_of(np.arange(len(lengths)), 1), np.arange(len(lengths)))


def test_a_partner_missing_and_a_pair_too_long_are_refused():
    with pytest.raises(DataError, match="3 documents do not divide"):
        grouped_lengths(np.array([1, 2, 3], np.int32), 2, seq_length=9)
    with pytest.raises(DataError, match=r"number 1, has 11 tokens"):
        grouped_lengths(np.array([1, 2, 5, 6], np.int32), 2, seq_length=10)


def test_the_manifest_says_whether_documents_are_pairs(tmp_path: Path):
    root = small_dataset(tmp_path / "set")
    assert read_manifest(root).group_size == 1
    rewrite_manifest(root, lambda manifest: manifest.update(kind="harmony_preference", pairs=True))
    assert read_manifest(root).group_size == 2
