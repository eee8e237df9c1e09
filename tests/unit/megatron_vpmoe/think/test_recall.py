"""A chunk asks with the one before it, and does not find its own document: nothing found hangs on a later token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.planning.card import fake_mode, on_paper
from megatron_vpmoe.planning.counting import Counting
from megatron_vpmoe.retrieval.vector_store import VectorStore
from megatron_vpmoe.think.recall import Recall, chunk_vectors, embedding_sha256, store_of

WIDTH, CHUNK, K = 5, 3, 2
TABLE = torch.from_numpy(np.random.default_rng(1).standard_normal((20, WIDTH)).astype(np.float32))


def text(length: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 20, length)


DOCUMENTS = [text(length, 30 + length) for length in (9, 10, 2, 12)]


def recall(k: int = K) -> Recall:
    return Recall(store_of(DOCUMENTS, TABLE, chunk=CHUNK), entries=k)


def asked(prefix: NDArray[np.int64], k: int, without: set[int]) -> NDArray[np.float32]:
    """By hand: the unit vectors of all chunks of other documents, the nearest first."""
    query = TABLE.numpy()[prefix[-CHUNK:]].mean(0)
    vectors = [
        TABLE.numpy()[ids[at : at + CHUNK]].mean(0)
        for number, ids in enumerate(DOCUMENTS)
        for at in range(0, len(ids) - CHUNK + 1, CHUNK)
        if number not in without
    ]
    units = np.stack([one / np.linalg.norm(one) for one in vectors])
    return units[np.argsort(-units @ query, kind="stable")[:k]]


def test_vectors_are_means_of_whole_chunks() -> None:
    ids = text(8, 0)
    embedded = TABLE.numpy()[ids]
    np.testing.assert_allclose(
        chunk_vectors(ids, TABLE.numpy(), CHUNK), [embedded[:3].mean(0), embedded[3:6].mean(0)], rtol=1e-6
    )
    assert chunk_vectors(ids[:2], TABLE.numpy(), CHUNK).shape == (0, WIDTH)


def test_each_chunk_asks_with_the_one_before_it() -> None:
    ids = text(11, 7)
    prefixes = [ids[:end] for end in range(0, 11, CHUNK)]
    found = recall().reminders(prefixes, TABLE)
    assert [one.count for one in found] == [0, K, K, K] and not found[0].entries.any()
    for prefix, one in zip(prefixes[1:], found[1:], strict=True):
        np.testing.assert_allclose(one.entries, asked(prefix, K, set()), atol=1e-6)


def test_what_begins_as_the_text_is_left_out() -> None:
    """The own document, and another as far as it begins alike."""
    own = DOCUMENTS[3]
    alike = np.concatenate([own[:6], text(6, 77)])
    whole = Recall(store_of([*DOCUMENTS, alike], TABLE, chunk=CHUNK), entries=50)
    held = len(whole.store)
    found = whole.reminders([own[:3], own[:6], own[:9]], TABLE)
    assert [one.count for one in found] == [held - 8, held - 8, held - 4]
    np.testing.assert_allclose(recall().reminders([own[:9]], TABLE)[0].entries, asked(own[:9], K, {3}), atol=1e-6)
    alone = Recall(store_of([own], TABLE, chunk=CHUNK), entries=K)
    assert [one.count for one in alone.reminders([own[:3], own[:9]], TABLE)] == [0, 0]


def test_of_a_capped_store_a_document_is_left_out_as_a_whole() -> None:
    """What is left of the oldest would be found by its own text: its first marks are gone."""
    held = sum(len(ids) // CHUNK for ids in DOCUMENTS)
    capped = Recall(store_of(DOCUMENTS, TABLE, chunk=CHUNK, capacity=held - 1), entries=50)
    assert len(capped.store) == held - len(DOCUMENTS[0]) // CHUNK
    only = Recall(store_of([DOCUMENTS[0], DOCUMENTS[1]], TABLE, chunk=CHUNK, capacity=5), entries=50)
    (found,) = only.reminders([DOCUMENTS[0][:CHUNK]], TABLE)
    assert found.count == len(DOCUMENTS[1]) // CHUNK


def test_a_finished_text_is_added_once_and_found_by_others_alone() -> None:
    ids, other = text(10, 50), text(12, 51)
    asking, wanted = [ids[:3], other[:3]], Recall(store_of([*DOCUMENTS, ids], TABLE, chunk=CHUNK), entries=50)
    mine, held = recall(50), len(recall().store)
    assert [one.count for one in mine.reminders(asking, TABLE)] == [held, held]
    assert mine.remember(ids, TABLE) == 3 and mine.remember(ids, TABLE) == mine.remember(ids[:2], TABLE) == 0
    found = mine.reminders(asking, TABLE)
    assert [one.count for one in found] == [held, held + 3]
    for one, same in zip(found, wanted.reminders(asking, TABLE), strict=True):
        np.testing.assert_array_equal(one.entries, same.entries)
    mine.store.read_only = True
    with pytest.raises(DataError, match="read-only"):
        mine.remember(other, TABLE)


def test_rows_are_their_documents_and_padding_reads_nothing() -> None:
    lengths = [[7, 4], [3]]
    document = torch.tensor([[0] * 7 + [1] * 4 + [-1], [0] * 3 + [-1] * 9], dtype=torch.int32)
    position = torch.tensor([[*range(7), *range(4), 0], [*range(3), *[0] * 9]])
    tokens = torch.from_numpy(np.stack([text(12, 8), text(12, 9)]))
    memory = recall().memory(tokens, SequenceLayout(document, position), TABLE)
    visible = memory.visible()
    for row, documents in enumerate(lengths):
        begin = 0
        for length in documents:
            ids = tokens[row, begin : begin + length].numpy()
            for at in range(length):
                read = memory.entries_BGKH[row].flatten(0, 1)[visible[row, begin + at]]
                (wanted,) = recall().reminders([ids[: at // CHUNK * CHUNK]], TABLE)
                np.testing.assert_array_equal(read.numpy(), wanted.entries[: wanted.count])
            begin += length
        assert not visible[row, begin:].any()


def test_training_waits_for_no_gpu() -> None:
    document, position = torch.zeros(1, 12, dtype=torch.int32), torch.arange(12)[None]
    tokens = torch.from_numpy(text(12, 8))[None]
    asked, counting = recall(), Counting(fake_mode(), 1, Tensor.numel)
    expected = asked.memory(tokens, SequenceLayout(document, position), TABLE)
    kept = SequenceLayout(document, position, rows_on_host=(tokens, document))
    for given in (tokens, torch.zeros_like(tokens)):  # the host's own are read
        assert all(map(torch.equal, asked.memory(given, kept, TABLE), expected))
    with on_paper("NVIDIA H100 80GB HBM3", 80 * 2**30, 1, counting) as on_card:
        layout = SequenceLayout(on_card(document), on_card(position), rows_on_host=(tokens, document))
        memory = asked.memory(on_card(tokens), layout, TABLE)
    assert memory.entries_BGKH.shape == expected.entries_BGKH.shape and not counting.counts.syncs


def test_a_store_of_another_embedding_is_refused() -> None:
    with pytest.raises(DataError, match="another embedding"):
        recall().reminders([text(3, 0)], TABLE + 1)
    near = TABLE.bfloat16()
    assert embedding_sha256(near) == embedding_sha256(TABLE) != embedding_sha256(TABLE + 1)
    with pytest.raises(DataError, match="does not say of what it was made"):
        Recall(VectorStore(WIDTH), entries=1)
