"""The runs of a run store as they are now, found by what a person calls them."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from megatron_vpmoe.metrics.jsonl import METRICS
from megatron_vpmoe.metrics.run_store import (
    LOCK,
    conclusion_of,
    found_directory,
    identity_of,
    read_directory,
    read_store,
    store_path,
)
from megatron_vpmoe.ownership import holder
from megatron_vpmoe.software import is_provenance
from vpmoe.errors import DataError

STATUSES = ("running", "finished", "stopped", "failed", "killed", "unknown")
"""Of a run: at work; its last step is done; it was asked to stop; it ended in an error; it ended without taking leave;
it works, or worked, where its directory or lock cannot be seen from here."""


@dataclass(frozen=True)
class RunEntry:
    """One run.

    Attributes:
        id: twelve hex digits, also in ``run.json`` of its directory.
        name: ``training.run_name``.
        experiment: ``logging.experiment``, or the name of the folder that its directory lies in.
        directory: where it is, or was when it was last seen.
        status: one of ``STATUSES``.
        started: seconds since the epoch.
        ended: likewise; None where it did not conclude.
        config: the resolved configuration by section.
        provenance: of ``collect_provenance``: git, config_hash, tokenizer, datasets, packages, hardware.
        results: the last values by tag of losses, validation, suites, rewards and throughput.
        tags: what a person has put on it.
        note: likewise.
        host: of rank 0.
        pid: of rank 0.
        world_size: processes.
        step: the last one recorded.
        error: what it failed of; or what of its row is damaged, and then empty here.
        segments: each start of it, the first and those that resumed it, as rows of the store.
        is_there: whether its directory is.
    """

    id: str
    name: str
    experiment: str
    directory: Path
    status: str
    started: float
    ended: float | None
    config: dict[str, Any]
    provenance: dict[str, Any]
    results: dict[str, float]
    tags: tuple[str, ...]
    note: str
    host: str
    pid: int
    world_size: int = 1
    step: int = 0
    error: str | None = None
    segments: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    is_there: bool = True

    @property
    def metrics(self) -> Path:
        """Its ``metrics.jsonl``."""
        return self.directory / METRICS


def list_runs(store: Path | None = None) -> list[RunEntry]:
    """Every run of a run store, the newest first; none where there is no store yet.

    Args:
        store: None: as ``run_store.store_path`` says.

    Raises:
        NotOursError, DataError, BusyError: as ``run_store.read_store``.
    """
    path = store_path(store)
    with read_store(path) as connection:
        if connection is None:
            return []
        rows = [dict(row) for row in connection.execute("SELECT * FROM runs ORDER BY started DESC, id")]
        tags, segments = _by_run(connection, "tags", "tag"), _by_run(connection, "segments", "number")
    return [_entry(path, row, tags.get(row["id"], []), segments.get(row["id"], [])) for row in rows]


def _by_run(connection: sqlite3.Connection, table: str, order: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in connection.execute(f"SELECT * FROM {table} ORDER BY {order}"):
        found.setdefault(row["run"], []).append(dict(row))
    return found


def _entry(store: Path, row: dict[str, Any], tags: list[dict[str, Any]], segments: list[dict[str, Any]]) -> RunEntry:
    # One row that somebody has damaged hides no other run, and can be removed like any.
    damaged = _emptied(row)
    there = found_directory(store, row["directory"], row["id"])
    directory = there or read_directory(store, row["directory"])
    row |= (there and conclusion_of(there)) or {}
    damaged += _emptied(row)
    read = {name: _object(row[name], fits) for name, fits in _OBJECTS.items()}
    damaged += [name for name, value in read.items() if value is None]
    config, provenance, results = ({} if value is None else value for value in read.values())
    return RunEntry(
        **{name: row[name] for name in ("id", "name", "experiment", "started", "ended", "note", "host", "pid")},
        **{name: row[name] for name in ("world_size", "step")},
        error=f"its {', '.join(damaged)} in the run store is damaged" if damaged else row["error"],
        directory=directory,
        status=_status(row, directory),
        config=config,
        provenance=provenance,
        results={tag: float(value) for tag, value in results.items()},
        tags=tuple(each["tag"] for each in tags),
        segments=tuple(segments),
        is_there=there is not None,
    )


def _emptied(row: dict[str, Any]) -> list[str]:
    """The columns whose values are of another kind, after they were set to what says nothing."""
    strange = [name for name, (fits, _) in _PLAIN.items() if not fits(row[name])]
    row |= {name: _PLAIN[name][1] for name in strange}
    return strange


def _object(text: str, fits: Callable[[Any], bool]) -> dict[str, Any] | None:
    """A column of JSON; None: no such object stands there."""
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    return value if isinstance(value, dict) and fits(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or value in ("nan", "inf", "-inf") or (type(value) is int and abs(value) < 1 << 63)


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < _YEAR_10000


_YEAR_10000 = 253_402_300_800.0
_OBJECTS: dict[str, Callable[[Any], bool]] = {
    "config": lambda sections: all(isinstance(fields, dict) for fields in sections.values()),
    "provenance": is_provenance,
    "results": lambda values: all(map(_is_number, values.values())),
}
"""Columns that hold JSON objects, and what these are."""
_PLAIN: dict[str, tuple[Callable[[Any], bool], Any]] = {
    **dict.fromkeys(("name", "experiment", "directory", "note", "host"), (lambda text: isinstance(text, str), "")),
    **dict.fromkeys(("step", "pid", "world_size"), (lambda number: type(number) is int and number >= 0, 0)),
    "status": (STATUSES.__contains__, "unknown"),
    "error": (lambda text: isinstance(text, str | None), None),
    "started": (_is_time, 0.0),
    "ended": (lambda value: value is None or _is_time(value), None),
}
"""The others: what they are, and what says nothing."""


def _status(row: Mapping[str, Any], directory: Path) -> str:
    """Of a run that has not concluded its lock tells; where that is not seen, its process."""
    if row["status"] != "running":
        return row["status"]
    lock = directory / LOCK
    if os.path.isfile(lock) and os.access(lock, os.R_OK):
        return "killed" if holder(lock) is None else "running"
    if row["host"] != socket.gethostname():
        return "unknown"
    try:
        return "running" if psutil.Process(row["pid"]).create_time() <= row["started"] else "killed"
    except psutil.Error:
        return "killed"


def checkpoints_of(directory: Path) -> list[Path]:
    """The checkpoints of a run by name, the newest first; whether they are sound is not looked at.

    None where the directory cannot be looked at: one of many runs may be of others, or on a file system that is away.
    """
    folder = directory / "checkpoints"
    try:
        named = [name for name in os.listdir(folder) if re.fullmatch(r"iter_\d+", name)]
    except (OSError, ValueError):
        return []
    return [folder / name for name in sorted(named, key=lambda name: int(name.removeprefix("iter_")), reverse=True)]


def labels(runs: Sequence[RunEntry]) -> list[str]:
    """What to call each of several runs: its name, with the beginning of its id where another has the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} {run.id[:4]}" for name, run in zip(names, runs, strict=True)]


def find_run(text: str, store: Path | None = None) -> RunEntry:
    """The run that ``text`` names: by its id, the beginning of one, its name (the newest of it), or its directory.

    Raises:
        DataError: there is none, or the beginning is of several ids; lists them.
    """
    return choose(text, list_runs(store), store_path(store))


def choose(text: str, runs: list[RunEntry], store: Path) -> RunEntry:
    """``find_run`` among ``runs``, the newest first."""
    if exact := [run for run in runs if run.id == text]:
        return exact[0]
    if named := [run for run in runs if run.name == text]:
        return named[0]
    if text and Path(text).is_dir():
        here, known = os.path.realpath(text), identity_of(Path(text))
        for run in runs:
            if run.id == known and (not run.is_there or os.path.realpath(run.directory) == here):
                return replace(run, directory=Path(text), is_there=True)  # perhaps it was moved
    begun = [run for run in runs if run.id.startswith(text)] if text else []
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise DataError(
            f"several runs begin with {text!r}: " + ", ".join(f"{run.id} ({run.name})" for run in begun),
            source=str(store),
            remedy="write more of the id",
        )
    if text and Path(text).is_dir():
        raise DataError("this directory is of no run in the store", source=text, remedy=f"vpmoe runs add {text}")
    near = ", ".join(dict.fromkeys(run.name for run in runs[:5])) or "none"
    raise DataError(
        f"no run is called {text!r}; the newest are: {near}",
        source=str(store),
        remedy="vpmoe runs list shows all of them",
    )
