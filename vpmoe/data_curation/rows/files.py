"""Rows of one file: parquet, JSONL, JSONL.zst, plain text; read a batch, a line or a text at a time.

A row that cannot be used (a line that is no JSON object, bytes that are no text) comes as a :class:`RowError` in its
place: builders list it with their other rejects. A file that cannot be read ends the work by its name.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_vpmoe.files import DEEPEST, at_depth
from vpmoe.data_curation.rows.parquet import Parquet
from vpmoe.errors import DataError, RowError

Row = Mapping[str, Any]
Placed = Iterator[tuple[str, Row | RowError, int]]
"""``(place, row or why it is none, bytes read)``; ``place`` names file and row for messages."""

TEXT_COLUMN = "text"
_BETWEEN_TEXTS = b"<|endoftext|>"
"""A line that ends a text in a file of several, as those of TinyStories and of OpenWebText are written."""


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
        """Those to read of a file's, in the file's order.

        Raises:
            DataError: a needed one is missing, or one to read is there twice.
        """
        names = list(present)
        if missing := [name for name in self.needed or () if name not in names]:
            raise DataError(
                f"columns {', '.join(missing)} are missing; found {', '.join(sorted(names))}",
                source=source,
                remedy="pass rows that have them, or name the columns that are there (--text-field, --id-field)",
            )
        wanted = names if self.needed is None else [n for n in names if n in (*self.needed, *self.optional)]
        if twice := sorted({name for name in wanted if wanted.count(name) > 1}):
            raise DataError(
                f"columns {', '.join(twice)} are there more than once",
                source=source,
                remedy="rename or drop one of each: which is meant cannot be told",
            )
        return wanted


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


def _jsonl_rows(path: Path, name: str) -> Placed:
    number = 0
    try:
        with path.open("rb") as raw:
            lines: Iterable[bytes] = raw
            if path.suffix == ".zst":
                # Arrow's reader goes on over frame after frame and, unlike others, notices a file that was cut off.
                lines = io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))  # pyright: ignore[reportArgumentType]
            for number, line in enumerate(lines, start=1):
                if text := line.removeprefix(codecs.BOM_UTF8).strip():
                    yield f"{name}:{number}", _json_row(text), raw.tell()
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error}", source=f"{path}, behind line {number}", remedy="fetch it again"
        ) from error


def _json_row(line: bytes) -> Row | RowError:
    shown = ascii(line[:80].decode(errors="replace"))
    try:
        row = json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start} of the line is not UTF-8", source=shown)
    except RecursionError:
        return _too_deep(shown)
    except RowError as error:
        return error
    except ValueError as error:
        return RowError("not_json", f"the line is not JSON: {error}", source=shown)
    if not isinstance(row, dict):
        return RowError("not_an_object", f"the line is {type(row).__name__}, not an object", source=shown)
    # As many brackets are needed for a depth: hardly a row has to be walked.
    if line.count(b"[") + line.count(b"{") > DEEPEST and any(isinstance(held, list | dict) for held in at_depth(row)):
        return _too_deep(shown)
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("key_twice", f"an object has the key {twice[:40]!r} more than once")
    return made


def _too_deep(shown: str) -> RowError:
    return RowError("too_deep", f"values are nested more than {DEEPEST} deep", source=shown)


def _parquet_rows(path: Path, name: str, columns: Columns) -> Placed:
    file = Parquet(path)
    wanted = columns.of(file.columns, str(path))
    size, total = path.stat().st_size, max(file.metadata.num_rows, 1)
    number = 0
    for group in range(file.num_row_groups):
        for row in file.rows(group, wanted):
            number += 1
            yield f"{name}:{number - 1}", row, size * number // total


def _text_file(path: Path, name: str, columns: Columns) -> Placed:
    """The file is a text; where lines of it are ``<|endoftext|>`` alone, each part between them is one."""
    columns.of([TEXT_COLUMN], str(path))
    begin, first, position, several, lines = 0, 1, 0, False, list[bytes]()
    with path.open("rb") as raw:
        for number, line in enumerate(raw, start=1):
            position += len(line)
            if line.strip() != _BETWEEN_TEXTS:
                lines.append(line)
                continue
            several = True
            if (text := b"".join(lines)).strip():
                yield f"{name}:{first}", _text_row(text.rstrip(b"\r\n"), begin), position
            begin, first, lines = position, number + 1, []
    text = b"".join(lines)
    if not several:
        yield name, _text_row(text, 0), position
    elif text.strip():
        yield f"{name}:{first}", _text_row(text.rstrip(b"\r\n"), begin), position


def _text_row(text: bytes, begin: int) -> Row | RowError:
    """Of a text that begins at that byte of its file."""
    try:
        return {TEXT_COLUMN: text.decode()}
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {begin + error.start} of the file is not UTF-8")
