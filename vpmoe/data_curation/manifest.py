"""Manifests: the last file written to a dataset, and the only thing that makes a folder of files a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_bytes, sha256_of_file, write_atomically
from vpmoe.errors import DataError

FILE_NAME = "manifest.json"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> Path:
    """Write ``manifest.json`` into ``folder``, atomically; call it last."""
    path = folder / FILE_NAME
    write_atomically(path, json_bytes(manifest))
    return path


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest in ``folder``, of ``kind`` if one is given.

    Raises:
        DataError: there is none, it is not JSON, or it is of another kind.
    """
    path = folder / FILE_NAME
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            "there is no manifest.json, so there is no dataset",
            source=str(folder),
            remedy="finish the step that makes it: vpmoe data convert for conversations, "
            "vpmoe data build for token files",
        ) from error
    except ValueError as error:
        raise DataError(f"the manifest is not JSON: {error}", source=str(path), remedy="write it again") from error
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found is None or (kind is not None and found != kind):
        raise DataError(
            f"the manifest is of kind {found!r}, expected {kind or 'a known kind'}",
            source=f"{path}: kind",
            remedy="pass the folder of the right step (conversations are the builder's input, token files its output)",
        )
    return manifest


def check_file(path: Path, entry: dict[str, Any], *, remedy: str, hashed: bool = True) -> None:
    """Hold a file against its manifest entry.

    Raises:
        DataError: missing, another size, or (if ``hashed``) another sha256.
    """
    if not path.is_file():
        raise DataError("a file of the manifest is missing", source=str(path), remedy=remedy)
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DataError(
            f"the file has {size} bytes, the manifest says {entry['bytes']}", source=str(path), remedy=remedy
        )
    if hashed and (found := sha256_of_file(path)) != entry["sha256"]:
        raise DataError(
            f"the file's sha256 is {found}, the manifest says {entry['sha256']}", source=str(path), remedy=remedy
        )
