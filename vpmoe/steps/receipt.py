"""``receipt.json``: what made a folder, out of what, and the files that it made; last in, with a hash of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vpmoe.errors import NotOursError
from megatron_vpmoe.files import RECEIPT, read_record, sha256_of_json

UNFINISHED = "unfinished.json"
"""In a partial folder: the key that it is made under and what is done of it; with a hash of itself too."""
_FIELDS = {
    RECEIPT: {"key": dict, "files": dict, "report": dict, "seconds": int | float},
    UNFINISHED: {"key": dict, "results": dict, "seconds": int | float},
}
_REMEDY = "make it again at another place, or move this folder away"


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of a folder, sound in itself; the files are not looked at.

    Returns:
        ``key`` (see :class:`~vpmoe.steps.Step`), ``files`` (name -> bytes, sha256), ``report`` (what the step tells),
        ``seconds`` (spent in all), ``provenance``, ``finished`` (local time).

    Raises:
        NotOursError: there is none, it is damaged, or it was edited.
    """
    return read_own(folder / RECEIPT)


def read_own(path: Path) -> dict[str, Any]:
    """The record at ``path``, a receipt or one of unfinished work, sound in itself.

    Raises:
        NotOursError: there is none, it is damaged, or it was edited.
    """
    record = read_record(path, error=NotOursError, remedy=_REMEDY)
    if faults := [name for name, kind in _FIELDS[path.name].items() if not isinstance(record.get(name), kind)]:
        raise NotOursError(f"{path.name} lacks {', '.join(faults)}", source=str(path), remedy=_REMEDY)
    return record


def content_sha256(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash for the contents of files by name (``bytes``, ``sha256``), such as a receipt's: what later keys hold."""
    return sha256_of_json({name: entry["sha256"] for name, entry in files.items()})


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each field of two keys that differs: ``settings.seed: 1 -> 2``."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{name}: {_short(before.get(name, 'absent'))} -> {_short(after.get(name, 'absent'))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


_ABSENT = object()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-12:]}"
