"""Rows of one file: parquet, JSONL, JSONL.zst, plain text; read a batch, a line or a text file at a time."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vpmoe.files import parse_json_lines
from vpmoe.errors import DataError

Row = Mapping[str, Any]
Placed = Iterator[tuple[str, Row, int]]
"""``(place, row, bytes read)``; ``place`` names file and row for messages."""

TEXT_COLUMN = "text"
_BATCH_ROWS = 512
# Read in pieces: not a whole column of a row group at once, and not mapped (a map counts as memory while it is read).
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a reader needs of rows.

    Attributes:
        needed: have to be there where the format has columns; None: all that are there are read.
        optional: are read where they are there.
    """

    needed: tuple[str, ...] | None = None
    optional: tuple[str, ...] = ()

    def of(self, present: Iterable[str], source: str) -> list[str]:
        """Those to read of a file's, in the file's order; raises :class:`DataError` if a needed one is missing."""
        names = list(present)
        if missing := [name for name in self.needed or () if name not in names]:
            raise DataError(
                f"columns {', '.join(missing)} are missing; found {', '.join(sorted(names))}",
                source=source,
                remedy="pass rows that have them, or name the columns that are there (--text-field, --id-field)",
            )
        return names if self.needed is None else [name for name in names if name in (*self.needed, *self.optional)]


def read_file(path: Path, name: str, columns: Columns) -> Placed:
    """The rows of a file.

    Args:
        path: one of a known format.
        name: of the file in messages and places.
        columns: what is needed.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    if path.suffix == ".parquet":
        return _parquet_rows(path, name, columns)
    return _text_file(path, name, columns) if path.suffix == ".txt" else _jsonl_rows(path, name)


def parquet_row_count(path: Path) -> int:
    """Number of rows, without reading them."""
    return open_parquet(path).metadata.num_rows


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file; raises :class:`DataError` if it is none."""
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES)
    except (OSError, pa.ArrowInvalid, UnicodeEncodeError) as error:  # the last: pyarrow opens no name but UTF-8
        raise DataError(
            f"not a readable parquet file: {error}", source=str(path), remedy="fetch or make the file again"
        ) from error


def strings(column: pa.ChunkedArray | pa.Array) -> list[str | bytes | None]:
    """Values of a string column; where a value is not UTF-8, it comes as its bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(pa.binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _jsonl_rows(path: Path, name: str) -> Placed:
    number = 0
    try:
        with path.open("rb") as raw:
            lines: Iterable[bytes] = raw
            if path.suffix == ".zst":
                # Arrow's reader goes on over frame after frame and, unlike others, notices a file that was cut off.
                lines = io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))  # pyright: ignore[reportArgumentType]
            for number, row in parse_json_lines(lines, str(path), ours=False):
                if not isinstance(row, dict):
                    raise DataError(
                        f"line {number} is not a JSON object: {type(row).__name__}",
                        source=f"{path}:{number}",
                        remedy="one JSON object a line",
                    )
                yield f"{name}:{number}", row, raw.tell()
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error}", source=f"{path}, behind line {number}", remedy="fetch it again"
        ) from error


def _parquet_rows(path: Path, name: str, columns: Columns) -> Placed:
    file = open_parquet(path)
    wanted = columns.of(file.schema_arrow.names, str(path))
    size, total = path.stat().st_size, max(file.metadata.num_rows, 1)
    row = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
            values = [_values(batch.column(column)) for column in batch.schema.names]
            for cells in zip(*values, strict=True):
                row += 1
                yield f"{name}:{row - 1}", dict(zip(batch.schema.names, cells, strict=True)), size * row // total
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"the file cannot be read: {error}", source=f"{path}, behind row {row}", remedy="fetch or make it again"
        ) from error


def _values(column: pa.Array) -> list[Any]:
    return strings(column) if pa.types.is_string(column.type) else column.to_pylist()


def _text_file(path: Path, name: str, columns: Columns) -> Placed:
    columns.of([TEXT_COLUMN], str(path))
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", source=str(path), remedy="name a readable file") from error
    try:
        text: str | bytes = raw.decode()
    except UnicodeDecodeError:
        text = raw
    yield name, {TEXT_COLUMN: text}, len(raw)
