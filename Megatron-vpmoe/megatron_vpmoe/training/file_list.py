"""The files of a directory by size and hash, and whether they are still so."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Path relative to ``folder`` -> bytes and sha256 of every file below it."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(path for path in folder.rglob("*") if path.is_file())
    }


def first_damage(folder: Path, files: Mapping[str, Mapping[str, Any]], *, check_hashes: bool) -> str | None:
    """The first file that is not as it was listed; None if all are.

    Args:
        files: from ``list_files``.
        check_hashes: compare contents, not only names and sizes.
    """
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
        if check_hashes and _sha256(file) != expected["sha256"]:
            return f"{name} does not have the sha256 that was written"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
