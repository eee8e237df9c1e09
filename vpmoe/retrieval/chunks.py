"""What a document asks of a store: each chunk with the one before it, so that no token reads what hangs on it.

Shapes: L tokens of a document, C chunks of it, K entries a chunk, W width; of rows B, G chunks a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpmoe.errors import DataError
from vpmoe.retrieval.vector_store import VectorStore


class Retrieved(NamedTuple):
    """What was found for each chunk.

    Attributes:
        entries: fp32 [C, K, W]; zero beyond the count.
        count: int64 [C]; 0 of a document's first chunk, before which there is nothing.
    """

    entries: NDArray[np.float32]
    count: NDArray[np.int64]


def chunk_vectors(embedded: NDArray[np.floating], size: int) -> NDArray[np.float64]:
    """[L // size, W]: the mean of each whole chunk of a document's embeddings [L, W]; what is left over has none."""
    whole = len(embedded) // size
    return embedded[: whole * size].reshape(whole, size, embedded.shape[1]).mean(1, dtype=np.float64)


def retrieve(
    store: VectorStore, embedded: NDArray[np.floating], *, size: int, k: int, document: int | None = None
) -> Retrieved:
    """For each chunk of a document the nearest to the chunk before it.

    Args:
        store: of chunks' vectors.
        embedded: [L, W], of the document's tokens.
        size: tokens of a chunk.
        k: entries of a chunk at most.
        document: the document's own vectors are not found; None: it has none in the store.
    """
    chunks = -(-len(embedded) // size)
    entries, count = np.zeros((chunks, k, store.width), np.float32), np.zeros(chunks, np.int64)
    if chunks > 1:
        queries = chunk_vectors(embedded, size)[: chunks - 1]
        found = store.search(queries, k, without=None if document is None else np.full(chunks - 1, document))
        entries[1:], count[1:] = found.vectors, found.count
    return Retrieved(entries, count)


def laid_in_rows(rows: Sequence[Sequence[Retrieved]], chunks: int, *, k: int, width: int) -> Retrieved:
    """Documents in the order of their rows, as ``megatron_vpmoe.think.memory`` counts chunks.

    Args:
        rows: the documents of each row.
        chunks: G.
        k: K.
        width: W.

    Returns:
        entries [B, G, K, W] and count [B, G], nothing beyond a row's documents.

    Raises:
        DataError: the documents of a row have more chunks.
    """
    entries = np.zeros((len(rows), chunks, k, width), np.float32)
    count = np.zeros((len(rows), chunks), np.int64)
    for row, documents in enumerate(rows):
        used = sum(len(one.count) for one in documents)
        if used > chunks:
            raise DataError(f"{used} chunks do not fit into {chunks}", source=f"row {row}", remedy="raise the number")
        for name, target in (("entries", entries), ("count", count)):
            if documents:
                target[row, :used] = np.concatenate([getattr(one, name) for one in documents])
    return Retrieved(entries, count)
