"""Receipts: what an object was made from, by what, and what was found when it was checked.

``receipt.json`` lies beside the weights. Its ``key`` hashes everything that decides the weights (job, settings,
geometry, contents of the inputs): an object whose receipt has today's key is up to date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_bytes, write_atomically
from megatron_vpmoe.software import git_state, package_versions
from vpmoe.errors import UpcycleError

NAME = "receipt.json"
_PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "mergekit", "numpy")
_KEYS = ("object", "key", "job", "settings", "inputs", "geometry", "outputs", "verification")


def write_receipt(folder: Path, receipt: dict[str, Any]) -> None:
    """Write ``folder/receipt.json``; ``receipt`` is JSON-able and holds at least the keys that reading asks for."""
    missing = [key for key in _KEYS if key not in receipt]
    assert not missing, f"a receipt without {missing}"
    write_atomically(folder / NAME, json_bytes(receipt))


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of an object.

    Raises:
        UpcycleError: there is none, or it is damaged.
    """
    path = folder / NAME
    try:
        receipt = json.loads(path.read_text())
        missing = [key for key in _KEYS if key not in receipt]
    except (OSError, ValueError, TypeError) as error:
        raise UpcycleError(
            f"no readable receipt: {error}",
            source=str(folder),
            remedy="make the object with `vpmoe upcycle run`, or remove the directory first",
        ) from error
    if missing:
        raise UpcycleError(
            f"the receipt lacks {', '.join(missing)}", source=str(path), remedy="make the object again with --force"
        )
    return receipt


def software() -> dict[str, Any]:
    """Code revision and the versions of what touches weights."""
    return {"git": git_state(), "packages": package_versions(_PACKAGES)}
