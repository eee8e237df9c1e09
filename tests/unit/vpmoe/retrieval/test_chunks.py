"""A chunk asks with the one before it: nothing retrieved hangs on a token that may read it, or on one behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.think.memory import Memory, chunks_of
from vpmoe.errors import DataError
from vpmoe.retrieval.chunks import chunk_vectors, laid_in_rows, retrieve
from vpmoe.retrieval.vector_store import VectorStore

WIDTH, SIZE = 5, 3


def embedded(length: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((length, WIDTH))


@pytest.fixture
def store() -> VectorStore:
    made = VectorStore(WIDTH)
    for document in range(4):
        chunks = chunk_vectors(embedded(9, document), SIZE)
        made.add(chunks, np.full(len(chunks), document))
    return made


def test_vectors_are_means_of_whole_chunks() -> None:
    x = embedded(8)
    np.testing.assert_allclose(chunk_vectors(x, SIZE), [x[:3].mean(0), x[3:6].mean(0)])
    assert chunk_vectors(x[:2], SIZE).shape == (0, WIDTH)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 9, 10])
def test_each_chunk_asks_with_the_one_before(store: VectorStore, length: int) -> None:
    x = embedded(length, 7)
    found = retrieve(store, x, size=SIZE, k=2)
    assert len(found.count) == -(-length // SIZE)
    assert found.count.tolist() == [0, 2, 2, 2][: len(found.count)]
    for chunk in range(1, len(found.count)):
        expected = store.search(x[None, (chunk - 1) * SIZE : chunk * SIZE].mean(1), 2)
        np.testing.assert_array_equal(found.entries[chunk], expected.vectors[0])


def test_a_token_moves_what_later_chunks_read_and_nothing_of_its_own(store: VectorStore) -> None:
    x = embedded(12, 7)
    before = retrieve(store, x, size=SIZE, k=12)
    for token in range(12):
        other = x.copy()
        other[token] += 100 * np.eye(WIDTH)[token % WIDTH]
        after = retrieve(store, other, size=SIZE, k=12)
        moved = [bool((a != b).any()) for a, b in zip(before.entries, after.entries, strict=True)]
        assert not any(moved[: token // SIZE + 1])
        assert moved[token // SIZE + 1 :][:1] in ([], [True])
        assert not any(moved[token // SIZE + 2 :])


def test_the_own_document_is_left_out(store: VectorStore) -> None:
    x = embedded(9, 2)
    own = chunk_vectors(x, SIZE)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    for document, expected in ((None, 1.0), (2, None)):
        found = retrieve(store, x, size=SIZE, k=1, document=document)
        cosine = (found.entries[1:, 0] * own[:2]).sum(1)
        assert np.allclose(cosine, 1) if expected else (cosine < 0.999).all()


def test_rows_are_counted_as_the_model_counts_them(store: VectorStore) -> None:
    """Of two rows of documents and padding, every position reads what its own chunk has found."""
    lengths = [[7, 4], [3]]
    found = [[retrieve(store, embedded(n, 20 + n), size=SIZE, k=2) for n in row] for row in lengths]
    laid = laid_in_rows(found, 5, k=2, width=WIDTH)
    document = torch.tensor([[0] * 7 + [1] * 4 + [-1], [0] * 3 + [-1] * 9], dtype=torch.int32)
    position = torch.tensor([[*range(7), *range(4), 0], [*range(3), *[0] * 9]])
    layout = SequenceLayout(document, position)
    memory = Memory(torch.from_numpy(laid.entries), torch.from_numpy(laid.count), chunks_of(layout, SIZE))
    visible = memory.visible()
    for row, documents in enumerate(lengths):
        begin = 0
        for number, length in enumerate(documents):
            for token in range(length):
                read = memory.entries_BGKH[row].flatten(0, 1)[visible[row, begin + token]]
                own = found[row][number]
                wanted = own.entries[token // SIZE][: own.count[token // SIZE]]
                np.testing.assert_array_equal(read.numpy(), wanted)
            begin += length
        assert not visible[row, begin:].any()
    with pytest.raises(DataError, match="chunks do not fit"):
        laid_in_rows(found, 3, k=2, width=WIDTH)
