"""Vectors of unit length, each of a document, and the nearest ones by inner product: FAISS, exact, on the CPU.

Johnson, Douze and Jégou 2017, arXiv 1702.08734.

Shapes: N vectors, Q queries, K neighbours, W width.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.errors import DataError, VpmoeError
from megatron_vpmoe.retrieval import store_format

_SPARE = 8  # candidates beside those asked for: FAISS multiplies in fp32, and the order is decided in fp64


class Found(NamedTuple):
    """The nearest vectors of each query, nearest first; of equally near ones the older.

    Attributes:
        vectors: fp32 [Q, K, W]; zero beyond the count.
        scores: fp32 [Q, K], cosines; zero beyond the count.
        count: int64 [Q], at most K.
    """

    vectors: NDArray[np.float32]
    scores: NDArray[np.float32]
    count: NDArray[np.int64]


class VectorStore:
    """Vectors in the order in which they came.

    Args:
        width: W.
        capacity: vectors at most; the oldest go for new ones, of a document all or none, since a part of one is not
            found by the marks that went. None: any number.
        read_only: what is held stays as it is.
        facts: what is to be known of the vectors, such as what they were made with; kept in the file.

    Raises:
        VpmoeError: FAISS is not installed.
    """

    def __init__(
        self,
        width: int,
        *,
        capacity: int | None = None,
        read_only: bool = False,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self.width, self.capacity, self.read_only, self.facts = width, capacity, read_only, dict(facts or {})
        self._faiss: Any = _faiss()
        self._index = self._faiss.IndexFlatIP(width)
        self._documents, self._marks = np.empty(0, np.int64), np.empty(0, np.int64)
        self._held_of: Counter[int] = Counter()
        self._marked: dict[int, frozenset[int]] | None = None

    def __len__(self) -> int:
        return len(self._documents)

    def add(
        self,
        vectors: NDArray[np.floating],
        documents: NDArray[np.integer],
        marks: NDArray[np.integer] | None = None,
    ) -> None:
        """Take vectors in, scaled to unit length; beyond the capacity the oldest documents go.

        Args:
            vectors: [N, W].
            documents: int [N], the document of each, whose vectors follow each other.
            marks: int64 [N], by which documents are found again; None: 0, which marks none.

        Raises:
            DataError: the store is read-only, shapes do not fit, a vector has no direction, or one document alone has
                more than the capacity. Nothing is added.
        """
        self._check_writable()
        unit = self._directions(vectors, "a vector to be added")
        documents = np.asarray(documents, np.int64)
        marks = np.zeros(len(unit), np.int64) if marks is None else np.asarray(marks, np.int64)
        for name, given in (("documents", documents), ("marks", marks)):
            if given.shape != (len(unit),):
                raise DataError(
                    f"{len(unit)} vectors came with {name} of shape {list(given.shape)}",
                    source="VectorStore.add",
                    remedy="one for each vector",
                )
        if self.capacity is not None:
            of_all = np.concatenate([self._documents, documents])
            gone = _whole(of_all, max(0, len(of_all) - self.capacity))
            if len(unit) and gone == len(of_all):
                raise DataError(
                    f"the last document has more vectors than the {self.capacity} that the store takes",
                    source="VectorStore.add",
                    remedy="a store of a larger capacity: vpmoe data build-store --capacity",
                )
            newest = max(0, gone - len(self))
            unit, documents, marks = unit[newest:], documents[newest:], marks[newest:]
            self._drop(gone - newest)
        self._index.add(unit)
        self._documents = np.concatenate([self._documents, documents])
        self._marks, self._marked = np.concatenate([self._marks, marks]), None
        self._held_of.update(documents.tolist())

    @property
    def next_document(self) -> int:
        """A number that no document here has."""
        return int(self._documents.max(initial=-1)) + 1

    def documents_marked(self, mark: int) -> frozenset[int]:
        """The documents that have a vector of this mark."""
        if self._marked is None:
            found: dict[int, set[int]] = {}
            for own, document in zip(self._marks.tolist(), self._documents.tolist(), strict=True):
                if own:
                    found.setdefault(own, set()).add(document)
            self._marked = {own: frozenset(documents) for own, documents in found.items()}
        return self._marked.get(mark, frozenset())

    def held(self, documents: Collection[int]) -> int:
        """Vectors of these documents."""
        return sum(self._held_of[document] for document in documents)

    def search(
        self, queries: NDArray[np.floating], k: int, *, without: Sequence[Collection[int]] | None = None
    ) -> Found:
        """The k vectors of largest cosine to each query; one answer does not hang on the other queries.

        Args:
            queries: [Q, W].
            k: at least 1.
            without: Q, of each query the documents whose vectors are not found.

        Raises:
            DataError: shapes do not fit, or a query has no direction.
        """
        unit = self._directions(queries, "a query")
        found = Found(
            np.zeros((len(unit), k, self.width), np.float32),
            np.zeros((len(unit), k), np.float32),
            np.zeros(len(unit), np.int64),
        )
        excluded = [()] * len(unit) if without is None else without
        # FAISS is asked for as many more as the excluded documents hold at most, and theirs are then left out.
        asked = min(len(self), k + _SPARE + max(map(self.held, excluded), default=0))
        if not asked or not len(unit):
            return found
        _, places = self._index.search(unit, asked)
        for query, documents in enumerate(excluded):
            own = np.sort(places[query])
            own = own[~np.isin(self._documents[own], list(documents))]
            vectors = self._index.reconstruct_batch(own) if len(own) else found.vectors[query, :0]
            scores = (vectors.astype(np.float64) * unit[query]).sum(1)
            order = np.argsort(-scores, kind="stable")[:k]
            found.count[query] = count = len(order)
            found.scores[query, :count] = scores[order]
            found.vectors[query, :count] = vectors[order]
        return found

    def reset(self) -> None:
        """Let go of all vectors.

        Raises:
            DataError: the store is read-only.
        """
        self._check_writable()
        self._drop(len(self))

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the store to a file, whole or not at all.

        Args:
            path: of the file.
            overwrite: replace a store that lies there.

        Raises:
            NotOursError: something that is no store lies there; or a store, and no ``overwrite``.
        """
        vectors = self._index.reconstruct_n(0, len(self))
        tensors = {"vectors": vectors, "documents": self._documents, "marks": self._marks}
        sizes = {"width": str(self.width), "capacity": str(self.capacity or "")}
        sizes["facts"] = json.dumps(self.facts, sort_keys=True)
        store_format.write(path, tensors, sizes, overwrite=overwrite)

    @classmethod
    def load(cls, path: Path, *, read_only: bool = True) -> VectorStore:
        """The store in a file.

        Raises:
            DataError: missing, damaged, or no store.
        """
        tensors, sizes = store_format.read(path)
        capacity = int(sizes["capacity"]) if sizes["capacity"] else None
        store = cls(int(sizes["width"]), capacity=capacity, facts=json.loads(sizes["facts"]))
        store._index.add(tensors["vectors"])
        store._documents, store._marks = tensors["documents"], tensors["marks"]
        store._held_of.update(tensors["documents"].tolist())
        store.read_only = read_only
        return store

    def _check_writable(self) -> None:
        if self.read_only:
            raise DataError(
                "the vector store is read-only",
                source="VectorStore",
                remedy="load it with read_only=False to change it",
            )

    def _directions(self, vectors: NDArray[np.floating], what: str) -> NDArray[np.float32]:
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise DataError(
                f"{what} is of shape {list(vectors.shape)}, the store's are of width {self.width}",
                source="VectorStore",
                remedy=f"rows of {self.width} numbers",
            )
        length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        if not (np.isfinite(length) & (length > 0)).all():
            row = int(np.flatnonzero(~(np.isfinite(length) & (length > 0)))[0])
            raise DataError(
                f"{what} has length {float(length[row, 0])}, and no direction",
                source=f"row {row}",
                remedy="every vector is finite and not zero",
            )
        return np.ascontiguousarray(vectors / length, np.float32)

    def _drop(self, count: int) -> None:
        """Let the oldest go; those behind move up."""
        if count:
            self._index.remove_ids(self._faiss.IDSelectorRange(0, count))
            self._held_of.subtract(self._documents[:count].tolist())
            self._held_of += Counter()  # forgets those of which nothing is held
            self._documents, self._marks, self._marked = self._documents[count:], self._marks[count:], None


def _whole(documents: NDArray[np.int64], count: int) -> int:
    """``count``, and as many more as end the document that it ends in."""
    while 0 < count < len(documents) and documents[count] == documents[count - 1]:
        count += 1
    return count


def _faiss() -> ModuleType:
    try:
        return importlib.import_module("faiss")
    except ImportError as cause:
        raise VpmoeError(
            "a vector store needs FAISS, which is not installed",
            source="megatron_vpmoe.retrieval",
            remedy="pip install 'vpmoe[retrieval]', or in this repository: .venv/bin/pip install -e '.[retrieval]'",
        ) from cause
