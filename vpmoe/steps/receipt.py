"""``receipt.json``: what made a folder, out of what, and the files that it made; last in, with a hash of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vpmoe.errors import NotOursError
from megatron_vpmoe.files import json_bytes, read_json, sha256_of_json, write_atomically

RECEIPT = "receipt.json"
UNFINISHED = "unfinished.json"
"""In a partial folder: the key that it is made under and what is done of it; with a hash of itself too."""
_FIELDS = {
    RECEIPT: {"key": dict, "files": dict, "report": dict, "seconds": int | float},
    UNFINISHED: {"key": dict, "results": dict, "seconds": int | float},
}
_REMEDY = "make it again at another place, or move this folder away"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a receipt or what is on record of unfinished work; it gets its own ``sha256``."""
    record = json.loads(json.dumps(record))
    write_atomically(path, json_bytes({**record, "sha256": sha256_of_json(record)}))


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of a folder, sound in itself; the files are not looked at.

    Returns:
        ``key`` (see :class:`~vpmoe.steps.Step`), ``files`` (name -> bytes, sha256), ``report`` (what the step tells),
        ``seconds`` (spent in all), ``software``, ``finished`` (local time).

    Raises:
        NotOursError: there is none, it is damaged, or it was edited.
    """
    return read_record(folder / RECEIPT)


def read_record(path: Path) -> dict[str, Any]:
    """What :func:`write_record` wrote, sound in itself.

    Raises:
        NotOursError: there is none, it is damaged, or it was edited.
    """
    record = read_json(path, error=NotOursError, remedy=_REMEDY)
    faults = [name for name, kind in _FIELDS[path.name].items() if not isinstance(record.get(name), kind)]
    stated = record.pop("sha256", None)
    if faults or stated != sha256_of_json(record):
        fault = f"lacks {', '.join(faults)}" if faults else "was edited: its hash is another"
        raise NotOursError(f"{path.name} {fault}", source=str(path), remedy=_REMEDY)
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
