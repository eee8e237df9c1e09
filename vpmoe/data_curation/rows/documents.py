"""Rows of any columns from files or from the hub, in one order: JSONL, JSONL.zst, parquet, plain text, hub dataset.

Reading is streaming: a line, a batch or a text file at a time, whatever the size of the source.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.conversations.store import strings
from vpmoe.data_curation.rows.hub import HubRows
from vpmoe.data_curation.rows.stream import Row, RowStream
from vpmoe.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")
TEXT_COLUMN = "text"
_BATCH_ROWS = 512


@dataclass
class DocumentRows:
    """A source of rows, resolved.

    Attributes:
        files: ``(name, path)`` of local files in reading order; empty for a hub dataset.
        hub_id, revision, config, split: of a hub dataset.
        name: what the user asked for, without any machine's folders.
        bytes_read: how far reading has come through the local files.
    """

    files: tuple[tuple[str, Path], ...]
    name: str
    hub_id: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    bytes_read: int = field(default=0, init=False)

    @property
    def total_bytes(self) -> int:
        """Size of the local files; 0 for a hub dataset."""
        return sum(path.stat().st_size for _, path in self.files)

    def rows(self, columns: tuple[str, ...] | None = None) -> Iterator[tuple[str, Row]]:
        """``(place, row)`` in a fixed order; ``place`` names file and row for messages.

        Args:
            columns: the columns that are needed, where a format can leave the others unread; None: all.

        Raises:
            DataError: a file or the hub dataset cannot be read, or lacks a column.
        """
        return iter(self.open(columns))

    def open(self, columns: tuple[str, ...] | None = None, cursor: Mapping[str, Any] | None = None) -> RowStream:
        """:meth:`rows` from ``cursor`` on: what a stream of this source gave between two rows."""
        if self.hub_id is None:
            return _LocalRows(self, columns, cursor["row"] if cursor else 0)

        def check(present: set[str]) -> None:
            _require(columns or (), sorted(present), str(self.hub_id))

        return HubRows(self.hub_id, self.revision, cursor, check, config=self.config, split=self.split, columns=columns)

    def as_manifest(self) -> dict[str, Any]:
        """The source as a manifest records it: name, hub revision, and name, bytes and sha256 of each local file."""
        files = [{"name": n, "bytes": p.stat().st_size, "sha256": sha256_of_file(p)} for n, p in self.files]
        hub = {"config": self.config, "split": self.split} if self.hub_id else {}
        return {"name": self.name, "hub_id": self.hub_id, "revision": self.revision, **hub, "files": files}


class _LocalRows:
    """The rows of local files; what lies before ``first`` is read again and left out."""

    def __init__(self, source: DocumentRows, columns: tuple[str, ...] | None, first: int) -> None:
        self._source, self._columns, self._row = source, columns, first

    def cursor(self) -> dict[str, Any]:
        return {"row": self._row}

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        behind, before = self._row, 0
        for name, path in self._source.files:
            for place, row, position in _reader(path)(name, path, self._columns):
                self._source.bytes_read = before + position
                if behind:
                    behind -= 1
                    continue
                self._row += 1
                yield place, row
            before += path.stat().st_size


def resolve(
    spelled: str, revision: str | None = None, *, hub_config: str | None = None, hub_split: str = "train"
) -> DocumentRows:
    """Find what ``spelled`` means: a path that exists, else a hub id of the form ``owner/name``.

    Raises:
        DataError: neither; a folder without a file of a known format; a hub id without a pinned revision.
    """
    path = Path(spelled)
    formats = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
    if path.is_file() and path.name.endswith(SUFFIXES):
        return DocumentRows(((path.name, path),), path.name)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
        if not found:
            raise DataError("the folder holds no file to read", source=spelled, remedy=f"pass a folder of {formats}")
        return DocumentRows(tuple((str(f.relative_to(path)), f) for f in found), path.resolve().name)
    owner_and_name = spelled.split("/")
    if len(owner_and_name) != 2 or not all(owner_and_name) or spelled.startswith((".", "/")) or path.suffix:
        raise DataError(
            f"no such file or folder of a known format, and not a hub id: {spelled}",
            source="--input",
            remedy=f"pass a file or folder of {formats}, or a hub id such as HuggingFaceFW/fineweb-edu",
        )
    if revision is None:
        raise DataError(
            f"{spelled} is no local path; read from the hub it needs a pinned revision",
            source="--revision",
            remedy="pass --revision <commit> (shown on the dataset's page), so that the build can be repeated",
        )
    return DocumentRows((), spelled, spelled, revision, hub_config, hub_split)


_Placed = Iterator[tuple[str, Row, int]]


def _reader(path: Path) -> Callable[[str, Path, tuple[str, ...] | None], _Placed]:
    if path.name.endswith(".parquet"):
        return _parquet_rows
    return _text_file if path.name.endswith(".txt") else _jsonl_rows


def _jsonl_rows(name: str, path: Path, columns: tuple[str, ...] | None) -> _Placed:
    del columns  # a line is read whole
    with path.open("rb") as raw:
        lines: Iterable[bytes] = raw
        if path.name.endswith(".zst"):
            # Arrow's reader goes on over frame after frame and, unlike others, notices a file that was cut off.
            lines = io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))  # pyright: ignore[reportArgumentType]
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                yield f"{name}:{number}", row, raw.tell()
        except OSError as error:
            raise DataError(
                f"the file cannot be read: {error}", source=f"{path}, behind line {number}", remedy="fetch it again"
            ) from error
        except ValueError as error:
            raise DataError(
                f"line is not a JSON object: {error}", source=f"{path}:{number}", remedy="one JSON object a line"
            ) from error


def _parquet_rows(name: str, path: Path, columns: tuple[str, ...] | None) -> _Placed:
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"not a readable parquet file: {error}", source=str(path), remedy="fetch the file again"
        ) from error
    present = file.schema_arrow.names
    _require(columns or (), present, str(path))
    size, total = path.stat().st_size, max(file.metadata.num_rows, 1)
    row = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns or present), use_threads=False):
        values = [_values(batch.column(column)) for column in batch.schema.names]
        for cells in zip(*values, strict=True):
            row += 1
            yield f"{name}:{row - 1}", dict(zip(batch.schema.names, cells, strict=True)), size * row // total


def _values(column: pa.Array) -> list[Any]:
    return strings(column) if pa.types.is_string(column.type) else column.to_pylist()


def _text_file(name: str, path: Path, columns: tuple[str, ...] | None) -> _Placed:
    _require(columns or (), [TEXT_COLUMN], str(path))
    raw = path.read_bytes()
    try:
        text: str | bytes = raw.decode()
    except UnicodeDecodeError:
        text = raw
    yield name, {TEXT_COLUMN: text}, len(raw)


def _require(wanted: tuple[str, ...], present: list[str], source: str) -> None:
    if missing := [name for name in wanted if name not in present]:
        raise DataError(
            f"columns {', '.join(missing)} are missing; found {', '.join(sorted(present))}",
            source=source,
            remedy="name the columns that are there (--text-field, --id-field, --language-field)",
        )
