"""Receipts: what an object was made from, by what, and what was found when it was checked.

``receipt.json`` lies beside the weights. Its ``key`` hashes everything that decides the weights (job, settings,
geometry, contents of the inputs): an object whose receipt has today's key is up to date.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_vpmoe.training.provenance import git_state
from vpmoe.errors import UpcycleError
from vpmoe.files import json_bytes, sha256_of_file, write_atomically

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


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Path relative to ``folder`` -> bytes and sha256 of every file below it."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
        for file in sorted(path for path in folder.rglob("*") if path.is_file())
    }


def damage(folder: Path, files: dict[str, dict[str, Any]], *, hashes: bool) -> str | None:
    """The first file that is not as the receipt says; None if all are.

    Args:
        files: from ``list_files``.
        hashes: compare contents, not only names and sizes.
    """
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the receipt says {expected['bytes']}"
        if hashes and sha256_of_file(file) != expected["sha256"]:
            return f"{name} does not have the receipt's sha256"
    return None


def software() -> dict[str, Any]:
    """Code revision and the versions of what touches weights."""
    packages = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"git": git_state(Path(__file__).parent), "packages": packages}
