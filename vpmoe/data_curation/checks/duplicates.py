"""Documents that are in both splits, found by a hash of their tokens, in bounded memory at any size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.files import Tell
from megatron_vpmoe.token_files import read_triple
from vpmoe.data_curation.datasets.plan import SPLITS

_TOGETHER = 1 << 22
"""Hashes that are looked for in one pass over the larger split: 32 MB of them. At the usual fractions one pass does."""


def bytes_to_read(manifest: dict[str, Any]) -> int:
    """How much :func:`across_splits` will tell to have hashed."""
    fewer, more = (manifest["splits"][split] for split in _by_rows(manifest))
    return 4 * (fewer["tokens"] + more["tokens"] * -(-fewer["rows"] // _TOGETHER))


def across_splits(folder: Path, manifest: dict[str, Any], tell: Tell) -> tuple[int, str]:
    """How many documents of the smaller split are in the other one too, and where the first of them stands.

    Args:
        folder: the dataset, whose shards are sound.
        manifest: its manifest.
        tell: told the bytes of each piece that is hashed.

    Raises:
        DataError: a shard is missing or damaged.
    """
    fewer, more = _by_rows(manifest)
    found, first, before = 0, "", 0
    for known in _hashes(folder / fewer, manifest["splits"][fewer], tell):
        twice = np.zeros(len(known), dtype=np.bool_)
        for others in _hashes(folder / more, manifest["splits"][more], tell):
            twice |= np.isin(known, others)
        if twice.any() and not first:
            first = f"{fewer} {before + int(twice.argmax())}"
        found += int(twice.sum())
        before += len(known)
    return found, first


def _by_rows(manifest: dict[str, Any]) -> list[str]:
    return sorted(SPLITS, key=lambda split: manifest["splits"][split]["rows"])


def _hashes(folder: Path, entry: dict[str, Any], tell: Tell) -> Iterator[NDArray[np.uint64]]:
    """blake2b (8 bytes) of the tokens of each document in their order, up to ``_TOGETHER`` at a time."""
    together = bytearray()
    for shard in entry["shards"]:
        for part in read_triple(folder, shard["name"]).parts():
            for place in map(part.place, range(part.documents)):
                together += hashlib.blake2b(part.tokens[place].tobytes(), digest_size=8).digest()
                if len(together) == 8 * _TOGETHER:
                    yield np.frombuffer(bytes(together), dtype=np.uint64)
                    together.clear()
            tell(part.tokens.nbytes)
    if together:
        yield np.frombuffer(bytes(together), dtype=np.uint64)
