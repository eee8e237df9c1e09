"""The packer: nothing lost, nothing too long, rows nearly full, and fast enough for a corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.data.cursor import SampleOrder
from megatron_vpmoe.data.packing import fit_companion_minimum, pack
from vpmoe.data_curation.conversations.synth import to_conversation
from vpmoe.harmony.prompts import Prompts
from vpmoe.harmony.renderer import make_renderer
from vpmoe.tokenizer.o200k_harmony import O200kHarmony

CAPACITY = 2048


def lognormal(median: float, sigma: float, count: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(np.log(median), sigma, count)
    return np.clip(np.exp(drawn), 40, CAPACITY).astype(np.int32)


def check(rows: list[list[int]], lengths: np.ndarray, capacity: int) -> None:
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and lengths[row].sum() <= capacity for row in rows)


@settings(max_examples=200)
@given(
    capacity=st.integers(1, 80),
    data=st.data(),
    companion_minimum=st.integers(0, 80),
)
def test_every_conversation_lands_in_exactly_one_row_that_holds_it(capacity, data, companion_minimum):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), np.int32)
    rows = pack(lengths, capacity, companion_minimum=companion_minimum)
    check(rows, lengths, capacity)
    # No two rows could have been one: the least that a fit must do.
    loads = sorted(int(lengths[row].sum()) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@settings(max_examples=50)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_equal_arguments_give_equal_rows(lengths):
    array = np.array(lengths, np.int32)
    threshold = fit_companion_minimum(array, 64)
    assert threshold == fit_companion_minimum(array.copy(), 64)
    assert pack(array, 64, companion_minimum=threshold) == pack(array.copy(), 64, companion_minimum=threshold)


# Medians and spreads from short generated rows to SYNTH's own (about 850 and 0.3).
@pytest.mark.parametrize(("median", "sigma"), [(76, 0.3), (300, 0.35), (600, 0.5), (850, 0.28), (850, 0.6)])
def test_rows_are_98_percent_full(median, sigma):
    lengths = lognormal(median, sigma, 4096)
    rows = pack(lengths, CAPACITY, companion_minimum=fit_companion_minimum(lengths, CAPACITY))
    check(rows, lengths, CAPACITY)
    assert lengths.sum() / (len(rows) * CAPACITY) >= 0.98


def test_the_real_rows_fill_98_percent(repository: Path):
    folder = repository.parent / "shared" / "data" / "synth_sample"
    if not folder.is_dir():
        pytest.skip(f"the sample of real rows is not here ({folder})")
    lengths = np.minimum(rendered_lengths(folder), CAPACITY).astype(np.int32)
    order = SampleOrder(lengths, seq_length=CAPACITY, window=4096, seed=1234)
    assert lengths.sum() / (order.first_sample_of_epoch(1) * CAPACITY) >= 0.98


def rendered_lengths(folder: Path) -> list[int]:
    """Tokens of each real row as a Harmony conversation with its end-of-document token."""
    tokenizer = O200kHarmony()
    renderer, prompts = make_renderer("fast", tokenizer), Prompts()
    tables = [parquet.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))]
    conversations = (to_conversation(row, prompts).messages for table in tables for row in table)
    return [len(renderer.render(messages)) + 1 for messages in conversations]


def test_exact_couples_and_triples_are_found():
    lengths = np.array([60, 40, 50, 30, 20, 70, 30, 100], np.int32)
    rows = pack(lengths, 100, companion_minimum=fit_companion_minimum(lengths, 100))
    assert [int(lengths[row].sum()) for row in rows] == [100] * 4
