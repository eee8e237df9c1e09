"""The store finds what a search by hand finds, keeps what it may, and a damaged file is named."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from megatron_vpmoe.errors import DataError, NotOursError, VpmoeError
from megatron_vpmoe.retrieval import vector_store
from megatron_vpmoe.retrieval.vector_store import VectorStore
from tests.conftest import fuzz_settings

WIDTH = 6


def vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def filled(count: int, **options: Any) -> VectorStore:
    store = VectorStore(WIDTH, **options)
    store.add(vectors(count), np.arange(count) // 2)
    return store


class _ByHand:
    """A list, and every cosine one by one; the oldest go by whole documents."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity, self.held = capacity, list[tuple[NDArray[Any], int]]()

    def add(self, given: NDArray[Any], documents: list[int]) -> None:
        for vector, document in zip(given, documents, strict=True):
            self.held.append((vector / np.sqrt((vector.astype(float) ** 2).sum()), document))
        while self.capacity is not None and len(self.held) > self.capacity:
            gone = self.held[0][1]
            while self.held and self.held[0][1] == gone:
                self.held.pop(0)

    def search(self, query: NDArray[Any], k: int, without: set[int]) -> list[tuple[float, NDArray[Any]]]:
        unit = query / np.sqrt((query.astype(float) ** 2).sum())
        scored = [(float(unit @ held), held) for held, document in self.held if document not in without]
        return sorted(scored, key=lambda one: -one[0])[:k]


@fuzz_settings(40)
@given(
    sizes=st.lists(st.integers(0, 7), max_size=4),
    documents=st.integers(1, 4),
    capacity=st.one_of(st.none(), st.integers(1, 9)),
    k=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_it_finds_what_is_found_by_hand(
    sizes: list[int], documents: int, capacity: int | None, k: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    store, by_hand = VectorStore(WIDTH, capacity=capacity), _ByHand(capacity)
    for size in sizes:
        given_vectors, of = 3 * draw.standard_normal((size, WIDTH)), draw.integers(0, documents, size)
        before = [*by_hand.held]
        by_hand.add(given_vectors, of.tolist())
        if size and not by_hand.held:  # the last document alone is too long
            with pytest.raises(DataError, match="the last document has more vectors"):
                store.add(given_vectors, of)
            by_hand.held = before
        else:
            store.add(given_vectors, of)
    assert len(store) == len(by_hand.held)
    assert store.next_document > max((document for _, document in by_hand.held), default=-1)
    queries, without = draw.standard_normal((3, WIDTH)), [{*draw.integers(-1, documents, n).tolist()} for n in range(3)]
    found = store.search(queries, k, without=without)
    assert found.vectors.shape == (3, k, WIDTH) and found.scores.shape == (3, k)
    for query in range(3):
        expected = by_hand.search(queries[query], k, without[query])
        count = found.count[query]
        assert count == len(expected)
        assert found.scores[query, :count].tolist() == pytest.approx([score for score, _ in expected], abs=1e-5)
        for vector, (_, wanted) in zip(found.vectors[query], expected, strict=False):
            np.testing.assert_allclose(vector, wanted, atol=1e-6)
        assert not found.vectors[query, count:].any() and not found.scores[query, count:].any()


def test_the_nearest_of_a_held_vector_is_itself_unless_its_document_is_left_out() -> None:
    store = filled(10)
    itself = store.search(vectors(10), 1)
    np.testing.assert_allclose(itself.scores[:, 0], 1, atol=1e-6)
    other = store.search(vectors(10), 1, without=[{n // 2} for n in range(10)])
    assert (other.scores[:, 0] < 0.999).all() and (other.count == 1).all()


def test_an_answer_does_not_hang_on_the_other_queries() -> None:
    store, queries = filled(400), vectors(30, 4)
    together = store.search(queries, 3, without=[{n} for n in range(30)])
    for n in range(30):
        for one, all_ in zip(store.search(queries[n : n + 1], 3, without=[{n}]), together, strict=True):
            np.testing.assert_array_equal(one[0], all_[n])


def test_an_empty_store_finds_nothing() -> None:
    found = VectorStore(WIDTH).search(vectors(3), 2)
    assert not found.count.any() and not found.vectors.any()


def test_a_saved_store_is_the_same_and_reads_only(tmp_path: Path) -> None:
    store = filled(9, capacity=7, facts={"chunk": "32"})
    store.add(vectors(2, 7), np.array([20, 21]), np.array([5, 5]))
    store.save(tmp_path / "store")
    loaded = VectorStore.load(tmp_path / "store")
    assert len(loaded) == 7 and loaded.capacity == 7 and loaded.facts == {"chunk": "32"}
    assert loaded.documents_marked(5) == {20, 21} and not loaded.documents_marked(0)
    for mine, theirs in zip(
        store.search(vectors(4, 1), 3, without=[{1}, {2, 3}, {3}, {9}]),
        loaded.search(vectors(4, 1), 3, without=[{1}, {2, 3}, {3}, {9}]),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)
    for change in (lambda: loaded.add(vectors(1), np.zeros(1, int)), loaded.reset):
        with pytest.raises(DataError, match="read-only"):
            change()
    writable = VectorStore.load(tmp_path / "store", read_only=False)
    writable.add(vectors(1, 5), np.array([8]))
    assert len(writable) == 6 and writable.search(vectors(1, 5), 1).scores[0, 0] == pytest.approx(1)


def test_reset_lets_go_of_all_and_an_empty_store_can_be_saved(tmp_path: Path) -> None:
    store = filled(5)
    store.reset()
    assert len(store) == 0 and not store.search(vectors(1), 1, without=[{0}]).count.any()
    store.save(tmp_path / "empty")
    assert len(VectorStore.load(tmp_path / "empty")) == 0


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "store"
    filled(3).save(path)
    before = path.read_bytes()
    with pytest.raises(NotOursError, match="a vector store lies here"):
        filled(4).save(path)
    assert path.read_bytes() == before
    filled(4).save(path, overwrite=True)
    assert len(VectorStore.load(path)) == 4
    letter = tmp_path / "letter"
    letter.write_text("dear all")
    with pytest.raises(NotOursError, match="no vector store"):
        filled(3).save(letter, overwrite=True)
    assert letter.read_text() == "dear all"
    assert {one.name for one in tmp_path.iterdir()} == {"store", "letter"}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "store"
    filled(4).save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError) as error:
            VectorStore.load(path)
        assert error.value.source == str(path)
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cannot be read"):
            VectorStore.load(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        VectorStore.load(path)
    save_file({"vectors": vectors(2)}, path)
    with pytest.raises(DataError, match="no vector store"):
        VectorStore.load(path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros((1, WIDTH)), "no direction"),
        (np.full((2, WIDTH), np.nan), "no direction"),
        (np.full((1, WIDTH), np.inf), "no direction"),
        (np.ones((1, WIDTH + 1)), "width 6"),
        (np.ones(WIDTH), "width 6"),
    ],
)
def test_vectors_that_cannot_be(wrong: NDArray[Any], says: str) -> None:
    store = filled(3)
    with pytest.raises(DataError, match=says):
        store.add(wrong, np.zeros(len(wrong), int))
    with pytest.raises(DataError, match=says):
        store.search(wrong, 1)
    assert len(store) == 3


def test_one_document_for_each_vector() -> None:
    with pytest.raises(DataError, match="2 vectors came with documents of shape"):
        VectorStore(WIDTH).add(vectors(2), np.zeros(3, int))


def test_without_faiss_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(vector_store.importlib, "import_module", missing)
    with pytest.raises(VpmoeError, match=r"vpmoe\[retrieval\]"):
        VectorStore(WIDTH)
