"""The file of a store: one of safetensors, with a hash of what it holds, and facts that are read without the rest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_vpmoe.errors import DataError, NotOursError
from megatron_vpmoe.files import json_line, write_atomically

FORMAT = "vpmoe vector store 2"
GROWN_FROM = "grown_from"
"""Fact of a store to which finished texts are added: the sha256 of the file that it began as a copy of."""


def write(path: Path, tensors: dict[str, NDArray[Any]], sizes: dict[str, str], *, overwrite: bool) -> None:
    """Write a store's arrays, and what is to be known of them, whole or not at all; raises as ``refuse_to_replace``."""
    refuse_to_replace(path, overwrite)
    sizes = {"format": FORMAT, **sizes}
    write_atomically(path, save(tensors, {**sizes, "sha256": _sha256(tensors, sizes)}))


def read(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """A store's arrays, and its sizes as they are written.

    Raises:
        DataError: missing, damaged, or no store.
    """
    remedy = "make the store again, or restore the file from a copy"
    try:
        with safe_open(path, "numpy") as held:
            sizes = dict(held.metadata() or {})
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as cause:
        raise DataError(f"the vector store cannot be read: {cause}", source=str(path), remedy=remedy) from cause
    if sizes.get("format") != FORMAT:
        raise DataError(
            f"this is no vector store: its format is {sizes.get('format')!r}, not {FORMAT!r}",
            source=str(path),
            remedy="name a file that VectorStore.save has written",
        )
    if sizes.pop("sha256", None) != _sha256(tensors, sizes):
        raise DataError("the vector store does not have the hash that was written", source=str(path), remedy=remedy)
    return tensors, sizes


def facts_of(path: Path) -> dict[str, str]:
    """What the file of a store says of its vectors, which are not read; {} of what is no store."""
    sizes = _sizes(path)
    return {} if sizes is None else json.loads(sizes["facts"])


def refuse_to_replace(path: Path, overwrite: bool) -> None:
    """Raise :class:`NotOursError` where something else lies than a store, or a store and it is not to be replaced."""
    if not path.exists():
        return
    if _sizes(path) is None:
        raise NotOursError("what lies here is no vector store", source=str(path), remedy="name another file")
    if not overwrite:
        raise NotOursError(
            "a vector store lies here", source=str(path), remedy="overwrite=True replaces it, or name another file"
        )


def _sizes(path: Path) -> dict[str, str] | None:
    """As they are written; None: it is no store."""
    try:
        with safe_open(path, "numpy") as held:
            sizes = dict(held.metadata() or {})
    except (OSError, SafetensorError):
        return None
    return sizes if sizes.get("format") == FORMAT else None


def _sha256(tensors: dict[str, NDArray[Any]], sizes: dict[str, str]) -> str:
    digest = hashlib.sha256(json_line(sorted(sizes.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json_line([name, str(tensor.dtype), *tensor.shape]).encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
