"""Manifests: the last file written to a dataset, and the only thing that makes a folder of files a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import first_damage, json_bytes, read_json, write_atomically
from vpmoe.errors import DataError

FILE_NAME = "manifest.json"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> Path:
    """Write ``manifest.json`` into ``folder``, atomically; call it last."""
    path = folder / FILE_NAME
    write_atomically(path, json_bytes(manifest))
    return path


def read_manifest(folder: Path, *kinds: str) -> dict[str, Any]:
    """The manifest in ``folder``, of one of ``kinds`` if any is given.

    Raises:
        DataError: there is none, it is not JSON, or it is of another kind.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise DataError(
            "there is no manifest.json, so there is no dataset",
            source=str(folder),
            remedy="finish what makes it: vpmoe data convert (conversations) or vpmoe data build (token files)",
        )
    manifest = read_json(path, remedy="make the dataset again")
    found = manifest.get("kind")
    if not isinstance(found, str) or (kinds and found not in kinds):
        raise DataError(
            f"the manifest is of kind {found!r}, expected {' or '.join(kinds) or 'a known kind'}",
            source=f"{path}: kind",
            remedy="pass the folder of the right step: vpmoe data convert makes conversations, vpmoe data build makes "
            "token files of them",
        )
    return manifest


@contextmanager
def naming_damage(*folders: Path, remedy: str) -> Iterator[None]:
    """Where a manifest is not of the shape that the block takes it to have, that is a :class:`DataError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"has a value of a wrong kind: {error}"
        source = " or ".join(str(folder / FILE_NAME) for folder in folders)
        raise DataError(f"the manifest {what}", source=source, remedy=remedy) from error


def check_files(folder: Path, files: dict[str, dict[str, Any]], *, remedy: str) -> None:
    """Hold files against their manifest's entries; raises :class:`DataError` for the first that differs."""
    if damage := first_damage(folder, files, check_hashes=True):
        raise DataError(damage, source=str(folder), remedy=remedy)
