"""The store of a dataset's training documents, over the embedding of a model, that a mixture reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.config.parameters import EMBEDDING
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.retrieval.store_format import refuse_to_replace
from megatron_vpmoe.retrieval.vector_store import VectorStore
from megatron_vpmoe.think.recall import store_of
from vpmoe.eval.open_model import open_model


def build_store(
    datasets: Sequence[Path],
    embedding: Path,
    output: Path,
    *,
    chunk: int,
    capacity: int | None = None,
    overwrite: bool = False,
) -> VectorStore:
    """Write the store of all training documents of some datasets.

    Args:
        datasets: of token files, at least one, all of the model's vocabulary.
        embedding: a model, as :func:`vpmoe.eval.open_model.open_model` takes it; nothing else of it is read.
        output: the file.
        chunk: tokens of a chunk.
        capacity: vectors at most; the oldest go.
        overwrite: replace a store that lies there.

    Raises:
        CheckpointError: no model there.
        TokenizerError: the vocabularies differ.
        DataError: a dataset is unusable, or no document has a whole chunk.
        NotOursError: something lies at ``output``.
    """
    refuse_to_replace(output, overwrite)
    manifests = [read_manifest(path) for path in datasets]
    with open_model(embedding) as opened:
        for manifest in manifests:
            opened.require_vocabulary(manifest)
        table = opened.weights[EMBEDDING].read()

    def documents() -> Iterator[NDArray[np.int32]]:
        for manifest in manifests:
            dataset = KDDataset(manifest, "train", seq_length=manifest.seq_length)
            yield from (dataset[number].tokens for number in range(len(dataset)))

    store = store_of(documents(), table, chunk=chunk, capacity=capacity)
    if not len(store):
        raise DataError(
            f"no document has {chunk} tokens, so there is no chunk",
            source=", ".join(map(str, datasets)),
            remedy="name a smaller --chunk",
        )
    store.save(output, overwrite=overwrite)
    return store
