"""SYNTH rows from wherever they are: a folder or file of parquet or JSONL, or a dataset on the hub, in one order.

Reading is streaming: one parquet batch or one line at a time, whatever the size of the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.conversations.store import strings
from vpmoe.data_curation.rows.hub import HubRows
from vpmoe.data_curation.rows.stream import Row, RowStream
from vpmoe.errors import DataError

COLUMNS = (
    "synth_id",
    "language",
    "exercise",
    "model",
    "constraints",
    "seed_license",
    "query_seed_url",
    "query",
    "synthetic_reasoning",
    "synthetic_answer",
)
READ_COLUMNS = ("synth_id", "language", "query", "synthetic_reasoning", "synthetic_answer")
_REQUIRED = ("synth_id", "query", "synthetic_reasoning", "synthetic_answer")
_BATCH_ROWS = 512
# Read in pieces: not a whole column of a row group at once, and not mapped (a map counts as memory while it is read).
_BUFFER_BYTES = 1 << 20


class _LocalRows:
    def __init__(self, files: tuple[Path, ...], row: int) -> None:
        self._files, self._row = files, row

    def cursor(self) -> dict[str, Any]:
        return {"row": self._row}

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        before = 0
        for path in self._files:
            rows = _parquet_rows if path.suffix == ".parquet" else _jsonl_rows
            if path.suffix == ".parquet" and before + _open(path).metadata.num_rows <= self._row:
                before += _open(path).metadata.num_rows
                continue
            for place, row in rows(path):
                before += 1
                if before > self._row:
                    self._row = before
                    yield place, row


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where rows come from, resolved.

    Attributes:
        files: local files in reading order; empty for a hub dataset.
        hub_id: ``owner/name``; None for local files.
        revision: commit of the hub dataset.
        name: what the user asked for, without any machine's folders.
    """

    files: tuple[Path, ...]
    hub_id: str | None
    revision: str | None
    name: str

    def rows(self) -> Iterator[tuple[str, Row]]:
        """``(place, row)`` in a fixed order; ``place`` names file and row for messages."""
        return iter(self.open())

    def open(self, cursor: Mapping[str, Any] | None = None) -> RowStream:
        """The rows from ``cursor`` on (what a stream of this source gave), or from the first."""
        if self.hub_id is not None:
            return HubRows(self.hub_id, self.revision, cursor, lambda names: _require(names, str(self.hub_id)))
        return _LocalRows(self.files, cursor["row"] if cursor else 0)

    def total_rows(self) -> int | None:
        """Number of rows where the files say it without being read (parquet), else None."""
        if self.hub_id is not None or any(path.suffix != ".parquet" for path in self.files):
            return None
        return sum(_open(path).metadata.num_rows for path in self.files)

    def as_manifest(self) -> dict[str, Any]:
        """The source as a manifest records it: name, revision, and name, bytes and sha256 of each local file."""
        files = [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256_of_file(p)} for p in self.files]
        return {"name": self.name, "hub_id": self.hub_id, "revision": self.revision, "files": files}


def resolve(spelled: str, revision: str | None = None) -> RowSource:
    """Find what ``spelled`` means: a path that exists, else a hub id of the form ``owner/name``.

    Raises:
        DataError: neither; a folder without parquet or JSONL; a hub id without a pinned revision.
    """
    path = Path(spelled)
    if path.is_file() and path.suffix in (".parquet", ".jsonl"):
        return RowSource((path,), None, None, path.name)
    if path.is_dir():
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(
                "the folder holds neither *.parquet nor *.jsonl", source=spelled, remedy="pass a folder of SYNTH rows"
            )
        return RowSource(tuple(files), None, None, path.resolve().name)
    owner_and_name = spelled.split("/")
    if len(owner_and_name) != 2 or not all(owner_and_name) or spelled.startswith((".", "/")) or path.suffix:
        raise DataError(
            f"no such file or folder, and not a hub id: {spelled}",
            source="--input",
            remedy="pass a parquet or JSONL file, a folder of them, or a hub id such as PleIAs/SYNTH",
        )
    if revision is None:
        raise DataError(
            f"{spelled} is no local path; read from the hub it needs a pinned revision",
            source="--revision",
            remedy="pass --revision <commit> (shown on the dataset's page), so that the conversion can be repeated",
        )
    return RowSource((), spelled, revision, spelled)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"not a readable parquet file: {error}", source=str(path), remedy="fetch the file again"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    shard = _open(path)
    _require(set(shard.schema_arrow.names), str(path))
    present = [name for name in READ_COLUMNS if name in shard.schema_arrow.names]
    row = 0
    for batch in shard.iter_batches(batch_size=_BATCH_ROWS, columns=present, use_threads=False):
        columns = [strings(batch.column(name)) for name in present]
        for values in zip(*columns, strict=True):
            yield f"{path.name}:{row}", dict(zip(present, values, strict=True))
            row += 1


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"line is not JSON: {error}", source=f"{path}:{number}", remedy="one JSON object a line"
                ) from error
            if not isinstance(row, dict):
                raise DataError("line is not a JSON object", source=f"{path}:{number}", remedy="one JSON object a line")
            yield f"{path.name}:{number}", row


def _require(names: set[str], source: str) -> None:
    if missing := [name for name in _REQUIRED if name not in names]:
        raise DataError(
            f"columns {', '.join(missing)} are missing; found {', '.join(sorted(names))}",
            source=source,
            remedy=f"SYNTH rows have the columns {', '.join(COLUMNS)}",
        )
