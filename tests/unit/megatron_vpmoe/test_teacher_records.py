"""The codings of a teacher's records: ids come back as they were, log-probabilities nearly; damage is found."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.annotation import FILLING_LOG_P, NO_RECORD
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.teacher_records import TeacherRecords
from tests.conftest import fuzz_settings


def draw(vocab: int, count: int, rows: int, sharp: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The likeliest of whole distributions, of which some are nearly certain."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, vocab)) * sharp
    logits[random.random(rows) < 0.2, 0] += 40
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    ids = np.argsort(-log_p, 1, kind="stable")[:, :count]
    return ids.astype(np.int32), np.take_along_axis(log_p, ids, 1).astype(np.float32), log_p[:, -1].astype(np.float32)


def by_id(ids: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_p.astype(np.float64), ids.argsort(1), 1)


@fuzz_settings(12)
@given(
    vocab=st.integers(1, 600),
    percent=st.integers(1, 100),
    rows=st.integers(0, 9),
    sharp=st.sampled_from([0.0, 0.5, 3.0, 12.0]),
    short=st.booleans(),
    coding=st.sampled_from(["exact", "compact"]),
    seed=st.integers(0, 2**16),
)
def test_records_come_back(vocab, percent, rows, sharp, short, coding, seed) -> None:
    count = max(1, vocab * percent // 100)
    records = TeacherRecords(count=count, vocab_size=vocab, coding=coding)
    ids, log_p, of_label = draw(vocab, count, rows, sharp, seed)
    if short:  # a server that knows ids that the dataset has not
        ids[:, count - count // 2 :], log_p[:, count - count // 2 :] = NO_RECORD, 0
    content = records.encode((ids, log_p, of_label))
    assert content.dtype == np.uint8 and len(content) == rows * records.width
    found, found_log_p, found_of_label = records.decode(content, "test")
    np.testing.assert_array_equal(found_of_label, of_label)
    assert ((found >= 0) & (found < vocab)).all()
    assert all(len(set(row)) == count for row in found.tolist()), "no id twice"
    assert (np.diff(found_log_p, axis=1) <= 0).all(), "likeliest first"
    known = ids != NO_RECORD
    filled = found_log_p == FILLING_LOG_P
    assert (filled.sum(1) == (~known).sum(1)).all()
    kept = known.sum(1)[:1].tolist() or [0]
    mine, theirs = (np.sort(array[:, : kept[0]], 1) for array in (ids, found))
    np.testing.assert_array_equal(mine, theirs)
    ours, theirs = (
        by_id(*pair)
        for pair in ((ids[:, : kept[0]], log_p[:, : kept[0]]), (found[:, : kept[0]], found_log_p[:, : kept[0]]))
    )
    if coding == "exact":
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ids[:, : kept[0]], found[:, : kept[0]])
    else:
        p = np.exp(ours)
        assert ((p * (ours - theirs)).sum(1) <= 2e-5).all(), "the KL that the coding costs"
        np.testing.assert_allclose(np.exp(theirs).sum(1), p.sum(1), rtol=2e-6)


@pytest.mark.slow
def test_bytes_and_cost_at_full_size() -> None:
    """K = 64 of o200k's 201,088: at most 200 bytes a position, and a KL below what fp16 logits cost."""
    records = TeacherRecords(count=64, vocab_size=201_088)
    assert records.width == 199 and TeacherRecords(count=64, vocab_size=201_088, coding="exact").width == 516
    ids, log_p, of_label = draw(201_088, 64, 6, 3.0, 1)
    found, found_log_p, _ = records.decode(records.encode((ids, log_p, of_label)), "test")
    ours, theirs = by_id(ids, log_p), by_id(found, found_log_p)
    tails = (1 - np.exp(ours).sum(1)).clip(1e-12), (1 - np.exp(theirs).sum(1)).clip(1e-12)
    kl = (np.exp(ours) * (ours - theirs)).sum(1) + tails[0] * np.log(tails[0] / tails[1])
    assert kl.max() < 2e-5 and kl.mean() < 5e-6
    np.testing.assert_allclose(np.log(tails[0]), np.log(tails[1]), atol=1e-3)


@pytest.mark.parametrize("coding", ["exact", "compact"])
def test_damage_is_found(coding: Literal["exact", "compact"]) -> None:
    records = TeacherRecords(count=4, vocab_size=50, coding=coding)
    whole = records.encode(draw(50, 4, 3, 1.0, 0))
    loss_mask = np.array([0, 1, 1, 1, 0], np.uint8)
    got = records.of_document(whole, loss_mask, "test")
    assert (got["teacher_ids"][[0, 4]] == NO_RECORD).all() and (got["teacher_ids"][1:4] >= 0).all()
    assert [each.shape for each in got.values()] == [(5, 4), (5, 4), (5,)]
    nothing = records.of_document(whole[:0], loss_mask, "test")
    assert (nothing["teacher_ids"] == NO_RECORD).all() and not nothing["teacher_log_p"].any()
    with pytest.raises(DataError, match="2 records of 3 supervised positions"):
        records.of_document(whole[: 2 * records.width], loss_mask, "test")
    with pytest.raises(DataError, match="are no records of"):
        records.of_document(whole[:-1], loss_mask, "test")
    spoilt = whole.copy()
    spoilt[:] = 255
    with pytest.raises(DataError, match=r"does not hold 4 ids|not finite, or an id outside"):
        records.decode(spoilt, "test")
