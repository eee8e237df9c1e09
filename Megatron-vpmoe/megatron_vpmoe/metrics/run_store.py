"""The run store: one SQLite file in which every run stands, whoever started it and wherever its directory lies.

A run keeps its identity in its directory (``run.json``), so that both find each other after the directory was moved.
Metrics are not in here: they stay in the run's ``metrics.jsonl``, whole also of a killed run.

The journal is SQLite's rollback journal. A write-ahead log would let readers and writers pass each other, and needs
memory that all of them share, which a network file system does not have; a run writes a row a checkpoint.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_vpmoe.errors import BusyError, DataError, NotOursError, VpmoeError, is_utf8
from megatron_vpmoe.files import json_bytes, place_of, read_json, write_atomically

VARIABLE = "VPMOE_RUN_STORE"
DEFAULT = Path("runs") / "registry.sqlite"
IDENTITY = "run.json"
"""In a run's directory: ``{"id": ...}``, and ``"concluded"`` where the store could not be told how it ended."""
LOCK = ".lock"
"""In a run's directory: held (``megatron_vpmoe.ownership``) by the run that is at work there."""
_APPLICATION = 0x76504D6F  # "vPMo", in the header of the file
_VERSION = 1
_PATIENCE_SECONDS = 20.0
_CONCLUDES = {"status", "error", "ended", "step", "results"}
_REMEDY_OF_IDENTITY = "remove it: the run then counts as a new one"
_REMEDY = f"name another file by logging.run_store or {VARIABLE}, or move this one away"

_SCHEMA = """
CREATE TABLE runs (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, experiment TEXT NOT NULL, directory TEXT NOT NULL,
  status TEXT NOT NULL, error TEXT, started REAL NOT NULL, ended REAL, step INTEGER NOT NULL,
  host TEXT NOT NULL, pid INTEGER NOT NULL, world_size INTEGER NOT NULL,
  config TEXT NOT NULL, config_hash TEXT, provenance TEXT NOT NULL, results TEXT NOT NULL,
  note TEXT NOT NULL DEFAULT ''
);
CREATE TABLE segments (
  run TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE, number INTEGER NOT NULL,
  status TEXT NOT NULL, error TEXT, started REAL NOT NULL, ended REAL, first_step INTEGER NOT NULL,
  last_step INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, world_size INTEGER NOT NULL,
  PRIMARY KEY (run, number)
);
CREATE TABLE tags (
  run TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE, tag TEXT NOT NULL, PRIMARY KEY (run, tag)
);
"""


def store_path(configured: str | Path | None = None) -> Path:
    """The file: ``configured``, else what the environment names, else ``runs/registry.sqlite`` of this folder."""
    return Path(configured or os.environ.get(VARIABLE) or DEFAULT)


def check_store(path: Path, directory: Path) -> None:
    """Look whether the run in ``directory`` can be registered in ``path``; makes nothing.

    Raises:
        NotOursError: something else than a run store lies there.
        DataError: it is damaged or of a later version, or nothing can be written there; or as ``written_directory``.
    """
    written_directory(path, directory)
    if os.path.lexists(path):
        with suppress(BusyError), opened_store(path):  # who writes there writes to a run store
            pass
        return
    place, fault = place_of(path.parent)
    if fault is not None:
        raise DataError(f"runs cannot be registered there: {place} {fault}", source=str(path), remedy=_REMEDY)


@contextmanager
def opened_store(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction that may write; the file is made, with its folder, where there is none.

    Raises:
        NotOursError, DataError: see ``check_store``.
        BusyError: another process has been writing for some seconds.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_PATIENCE_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN IMMEDIATE")
            if not _checked(connection, path):
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            yield connection
            connection.execute("COMMIT")


@contextmanager
def read_store(path: Path) -> Iterator[sqlite3.Connection | None]:
    """A connection that can only read, with rows by name; None where there is no run store yet.

    Raises:
        NotOursError, DataError, BusyError: as ``opened_store``.
    """
    if not os.path.lexists(path):
        yield None
        return
    with _explained(path):
        # What a killed writer has left is rolled back by whoever comes next, which takes the right to write.
        mode = "rw" if os.access(path, os.W_OK) else "ro"
        address = f"{path.absolute().as_uri()}?mode={mode}"
        with closing(sqlite3.connect(address, uri=True, timeout=_PATIENCE_SECONDS, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA query_only = ON")
            connection.execute("BEGIN")
            yield connection if _checked(connection, path) else None


def _checked(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether this is a run store; False: an empty file."""
    application, version, tables = (
        connection.execute(question).fetchone()[0]
        for question in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if application != _APPLICATION:
        if (application, version, tables) == (0, 0, 0):
            return False
        raise NotOursError("here lies a database of others, no run store", source=str(path), remedy=_REMEDY)
    if version != _VERSION:
        raise DataError(
            f"the run store is of version {version}, and this code knows {_VERSION}",
            source=str(path),
            remedy="use the version of the code that wrote it, or name another file by " + VARIABLE,
        )
    return True


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of SQLite as typed ones."""
    try:
        yield
    except sqlite3.Error as error:
        raise _typed(error, path) from error


def _typed(error: sqlite3.Error, path: Path) -> VpmoeError:
    code = getattr(error, "sqlite_errorcode", None)
    kind = None if code is None else code & 0xFF
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return BusyError(
            "another process has been writing to the run store for a while",
            source=str(path),
            remedy="try again; where nobody does, a lock on a network file system was left: name another file by "
            + VARIABLE,
        )
    if kind == sqlite3.SQLITE_NOTADB:
        return NotOursError("this file is no run store", source=str(path), remedy=_REMEDY)
    if kind == sqlite3.SQLITE_CORRUPT:
        return DataError(f"the run store is damaged: {error}", source=str(path), remedy=_REMEDY)
    return DataError(f"the run store cannot be used: {error}", source=str(path), remedy=_REMEDY)


def identity_of(directory: Path) -> str | None:
    """The id of the run whose directory this is; None: it has none yet.

    Raises:
        DataError: ``run.json`` is no identity.
    """
    path = directory / IDENTITY
    if not path.is_file():
        return None
    found = read_json(path, remedy=_REMEDY_OF_IDENTITY).get("id")
    if not isinstance(found, str) or not found:
        raise DataError("it names no run", source=str(path), remedy=_REMEDY_OF_IDENTITY)
    return found


def conclusion_of(directory: Path) -> dict[str, Any] | None:
    """What the row of a run should say of its end and does not; None: the row says it, or it has not ended.

    Raises:
        DataError: ``run.json`` is no identity.
    """
    if identity_of(directory) is None:
        return None
    found = read_json(directory / IDENTITY, remedy=_REMEDY_OF_IDENTITY).get("concluded")
    return found if isinstance(found, dict) and found.keys() == _CONCLUDES else None


def conclude(directory: Path, row: Mapping[str, Any] | None) -> None:
    """Keep in a run's directory what ``row`` says of its end, until the run goes on (None)."""
    run = identity_of(directory)
    if run is not None and (row is not None or conclusion_of(directory) is not None):
        concluded = {} if row is None else {"concluded": {name: row[name] for name in sorted(_CONCLUDES)}}
        write_atomically(directory / IDENTITY, json_bytes({"id": run, **concluded}))


def identify(connection: sqlite3.Connection, store: Path, directory: Path) -> str:
    """The id of the run in ``directory``, which gets one where it has none or is a copy of another run's directory."""
    known = identity_of(directory)
    if known is not None:
        row = connection.execute("SELECT directory FROM runs WHERE id = ?", (known,)).fetchone()
        elsewhere = None if row is None else found_directory(store, row[0], known)
        if elsewhere is None or os.path.samefile(elsewhere, directory):
            return known
    fresh = secrets.token_hex(6)
    write_atomically(directory / IDENTITY, json_bytes({"id": fresh}))
    return fresh


def experiment_of(configured: str | None, directory: Path) -> str:
    """What a run in ``directory`` belongs to: ``configured``, else the name of the folder that it lies in."""
    name = directory.resolve().parent.name.encode(errors="backslashreplace").decode()
    return configured or name or "/"


def written_directory(store: Path, directory: Path) -> str:
    """As the store keeps it: relative to its own folder where it lies in there, so that both can be moved together.

    Raises:
        DataError: it is not UTF-8.
    """
    here, folder = (Path(os.path.realpath(path)) for path in (directory, store.parent))
    written = str(here.relative_to(folder) if here.is_relative_to(folder) else here)
    if not is_utf8(written):
        raise DataError(
            f"the run's directory is not UTF-8: {written!a}",
            source=f"the run store {store}",
            remedy="rename the folder: neither the store nor DuckDB takes such a name",
        )
    return written


def read_directory(store: Path, written: str) -> Path:
    """The reverse of ``written_directory``."""
    return Path(os.path.realpath(store.parent)) / written


def found_directory(store: Path, written: str, run: str) -> Path | None:
    """Where a run's directory is now, if it is where it was or a step has finished that it was made in.

    A step works in ``<folder>.partial`` and renames it at its end.
    """
    recorded = read_directory(store, written)
    finished = Path(*(part.removesuffix(".partial") for part in recorded.parts))
    for path in dict.fromkeys((recorded, finished)):
        try:
            if identity_of(path) == run:
                return path
        except (OSError, DataError):  # such as a folder of others, or a file system that is away
            continue
    return None


def moved(store: Path, directory: Path) -> None:
    """Tell the store that a run's directory, or what is kept of it, lies in ``directory`` now.

    A directory without identity, or a store that does not know it, is left alone.

    Raises:
        VpmoeError: as ``opened_store``.
    """
    run = identity_of(directory)
    if run is None or not store.exists():
        return
    with opened_store(store) as connection:
        connection.execute("UPDATE runs SET directory = ? WHERE id = ?", (written_directory(store, directory), run))


def put_row(connection: sqlite3.Connection, table: str, row: Mapping[str, Any], *key: str) -> None:
    """Insert a row, or update what it names of the one with the same ``key``."""
    names = ", ".join(row)
    places = ", ".join("?" for _ in row)
    changes = ", ".join(f"{name} = excluded.{name}" for name in row if name not in key)
    connection.execute(
        f"INSERT INTO {table} ({names}) VALUES ({places}) ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changes}",
        list(row.values()),
    )


def json_text(value: Any) -> str:
    """JSON for a column: a number that is none is a string, as in ``metrics.jsonl``."""
    plain = {k: v if not isinstance(v, float) or v - v == 0 else str(v) for k, v in value.items()}
    return json.dumps(plain, allow_nan=False)
