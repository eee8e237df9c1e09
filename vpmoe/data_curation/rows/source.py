"""Where rows come from: files of any known format, or a dataset on the hub, in one order, to be gone on with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_vpmoe.files import file_entry
from vpmoe.data_curation.rows.files import Columns, Row, read_file
from vpmoe.data_curation.rows.hub import HubRows, commit
from vpmoe.data_curation.rows.parquet import row_count
from vpmoe.errors import DataError, RowError
from vpmoe.progress import hashing

SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".txt")


class RowStream(Protocol):
    """``(place, row or why it is none)`` in a fixed order; ``place`` names file and row for messages."""

    def __iter__(self) -> Iterator[tuple[str, Row | RowError]]: ...

    def cursor(self) -> dict[str, Any]:
        """Where another stream of the same source would go on, JSON; to be called between two rows."""
        ...


@dataclass
class RowSource:
    """A source of rows, resolved.

    Attributes:
        files: ``(name, path)`` of local files in reading order; empty for a hub dataset.
        name: what the user asked for, without any machine's folders.
        path: what the user asked for on this machine; None for a hub dataset.
        hub_id, revision, config, split: of a hub dataset.
        bytes_read: how far reading has come through the local files.
    """

    files: tuple[tuple[str, Path], ...]
    name: str
    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    bytes_read: int = field(default=0, init=False)

    @property
    def total_bytes(self) -> int:
        """Size of the local files; 0 for a hub dataset."""
        return sum(path.stat().st_size for _, path in self.files)

    def total_rows(self) -> int | None:
        """Number of rows where the files say it without being read (parquet), else None."""
        if not self.files or any(path.suffix != ".parquet" for _, path in self.files):
            return None
        return sum(row_count(path) for _, path in self.files)

    def rows(self, columns: tuple[str, ...] | None = None) -> Iterator[tuple[str, Row]]:
        """All rows, for readers that keep no list of rejects; see :meth:`open`.

        Raises:
            DataError: one of them cannot be used.
        """
        for place, row in self.open(columns):
            if isinstance(row, RowError):
                raise DataError(row.what, source=place, remedy="mend or remove the row")
            yield place, row

    def open(
        self,
        columns: tuple[str, ...] | None = None,
        cursor: Mapping[str, Any] | None = None,
        *,
        optional: tuple[str, ...] = (),
    ) -> RowStream:
        """The rows in a fixed order.

        Args:
            columns: those that have to be there, where a format has columns; others are left unread. None: all.
            cursor: where to go on, what a stream of this source gave between two rows; None: at the first.
            optional: columns to read too where they are there.

        Raises:
            DataError: while reading: a file or the hub dataset cannot be read, or lacks a column.
        """
        wanted = Columns(columns, optional)
        if self.hub_id is None:
            return _LocalRows(self, wanted, cursor["row"] if cursor else 0)
        return HubRows(self.hub_id, self.revision, cursor, wanted, config=self.config, split=self.split)

    def identity(self) -> dict[str, Any]:
        """What decides the rows: revision on the hub, or name, bytes and sha256 of each file."""
        if self.hub_id is not None:
            return {"hub_id": self.hub_id, "revision": self.revision, "config": self.config, "split": self.split}
        with hashing("hashing the input", self.total_bytes) as tell:
            return {"files": [{"name": name, **file_entry(path, tell)} for name, path in self.files]}

    def as_manifest(self) -> dict[str, Any]:
        """The source as a manifest records it: :meth:`identity` and the name."""
        return {"name": self.name, "hub_id": None, "revision": None, "files": [], **self.identity()}


class _LocalRows:
    """The rows of local files; what lies before ``first`` is left out, whole parquet files unread."""

    def __init__(self, source: RowSource, columns: Columns, first: int) -> None:
        self._source, self._columns, self._row = source, columns, first

    def cursor(self) -> dict[str, Any]:
        return {"row": self._row}

    def __iter__(self) -> Iterator[tuple[str, Row | RowError]]:
        behind, bytes_before = self._row, 0
        for name, path in self._source.files:
            count = row_count(path) if behind and path.suffix == ".parquet" else None
            if count is not None and count <= behind:
                behind -= count
            else:
                for place, row, position in read_file(path, name, self._columns):
                    self._source.bytes_read = bytes_before + position
                    if behind:
                        behind -= 1
                        continue
                    self._row += 1
                    yield place, row
            bytes_before += path.stat().st_size


def resolve(
    spelled: str,
    revision: str | None = None,
    *,
    hub_config: str | None = None,
    hub_split: str = "train",
    suffixes: tuple[str, ...] = SUFFIXES,
) -> RowSource:
    """Find what ``spelled`` means: a path that exists, else a hub id of the form ``owner/name``.

    Args:
        spelled: what the user asked for.
        revision: commit; needed for a hub dataset, and of nothing else.
        hub_config, hub_split: of a hub dataset.
        suffixes: of the files that are read; of a folder, all that are below it.

    Raises:
        DataError: neither; a folder without such a file, or with one that cannot be reached; a hub id without a
            commit.
    """
    path = Path(spelled)
    if path.exists() and (revision is not None or hub_config is not None):
        raise DataError(
            f"{spelled} is a local path, which has no revision or configuration",
            source="--revision, --hub-config",
            remedy="leave them out; or, if the hub's dataset is meant, run it where no such path is",
        )
    shown = ", ".join(f"*{suffix}" for suffix in suffixes)
    if path.is_file() and path.name.endswith(suffixes):
        return RowSource(((path.name, path),), path.name, path)
    if path.is_dir():
        if not (found := _files_below(path, suffixes)):
            raise DataError("the folder holds no file to read", source=spelled, remedy=f"pass a folder of {shown}")
        named = tuple((str(file.relative_to(path)), file) for file in found)
        return RowSource(named, path.resolve().name, path)
    owner_and_name = spelled.split("/")
    if len(owner_and_name) != 2 or not all(owner_and_name) or spelled.startswith((".", "/")) or path.suffix:
        raise DataError(
            f"no such file or folder of a known format, and not a hub id: {spelled}",
            source="--input",
            remedy=f"pass a file or folder of {shown}, or a hub id such as PleIAs/SYNTH",
        )
    return RowSource((), spelled, None, spelled, commit(spelled, revision), hub_config, hub_split)


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of these suffixes, sorted; whatever could hold more of them and is not read is an error."""

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for at, folders, files in os.walk(folder, onerror=fail):
        here = [Path(at, name) for name in files if name.endswith(suffixes)]
        beyond = [Path(at, name) for name in folders if Path(at, name).is_symlink()]
        if left_out := beyond + [path for path in here if not path.is_file()]:
            raise DataError(
                "this is no file but a link to a folder or to nothing, and its rows would be missing",
                source=str(left_out[0]),
                remedy="mend or remove it, or give what it leads to as an input of its own",
            )
        found += here
    return sorted(found)
