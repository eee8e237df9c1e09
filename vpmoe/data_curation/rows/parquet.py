"""Parquet with care: damage is named by file and row group, bytes are text where they are UTF-8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpmoe.errors import DataError, RowError

_BATCH_ROWS = 512
# Read in pieces: not a whole column of a row group at once, and not mapped (a map counts as memory while it is read).
_BUFFER_BYTES = 1 << 20
_DAMAGE = (OSError, ValueError, LookupError, ArithmeticError, MemoryError, pa.ArrowException)
"""What Arrow raises of bytes that it cannot make sense of."""


class Parquet(pq.ParquetFile):
    """A parquet file.

    Args:
        path: of the file.

    Attributes:
        columns: names in the file's order.

    Raises:
        DataError: it is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._naming("not a readable parquet file"):
            super().__init__(path, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
            self.columns: list[str] = self.schema_arrow.names

    def batches(self, group: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """A row group in pieces; raises :class:`DataError` for a damaged one."""
        with self._naming(f"row group {group} cannot be read"):
            left = self.metadata.row_group(group).num_rows
            for batch in self.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
                left -= batch.num_rows
                yield batch
            if left:
                raise ValueError(f"{left} of its rows are missing")

    def rows(self, group: int, columns: Sequence[str]) -> Iterator[Mapping[str, Any] | RowError]:
        """:func:`rows_of` of a group."""
        for batch in self.batches(group, columns):
            yield from rows_of(batch)

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise DataError(
                f"{what}: {error}", source=str(self._path), remedy="fetch or make the file again"
            ) from error


def row_count(path: Path) -> int:
    """Number of rows, without reading them."""
    return Parquet(path).metadata.num_rows


def rows_of(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any] | RowError]:
    """Rows; one that holds what is no text or no value of Python comes as a :class:`RowError`."""
    names = batch.schema.names
    for cells in zip(*map(_values, names, batch.columns), strict=True):
        if RowError in map(type, cells):
            yield next(cell for cell in cells if isinstance(cell, RowError))
        else:
            yield dict(zip(names, cells, strict=True))


def decoded(value: Any) -> Any:
    """Bytes as text if they are UTF-8, at any depth; what else is there stays."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return list(map(decoded, value))
    return {name: decoded(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def _values(name: str, column: pa.Array) -> list[Any]:
    try:
        values = column.to_pylist()
    except _DAMAGE:
        values = [_value(name, scalar) for scalar in column]
    return decoded(values) if "binary" in str(column.type) else values


def _value(name: str, scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return RowError("invalid_utf8", f"{name} is not UTF-8")
    except _DAMAGE as error:
        return RowError("unreadable_value", f"{name}: {error}")
