"""Records of the runs that pages look at, in memory: of a file that grows, only what was appended is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

import duckdb

from vpmoe.runs.database import metrics_of, readable, records_in
from vpmoe.runs.registry import RunEntry

if TYPE_CHECKING:
    import pandas

_PIECE_BYTES = 64 << 20
_KEPT_BYTES = 2 << 30
"""Of files: what is longer goes from memory, the runs that were looked at least recently first."""
_TAIL_BYTES = 256


@dataclass
class _File:
    """What was read of a run's metrics.

    Attributes:
        table: that holds it.
        identity: device and inode.
        end: of the last whole line that was read.
        tail: the bytes before it.
        seen: size and time of the last change when it was read.
    """

    table: str
    identity: tuple[int, int]
    end: int = 0
    tail: bytes = b""
    seen: tuple[int, int] = (-1, -1)


class Records:
    """Answers questions about runs from their records; for any number of threads.

    Attributes:
        bytes_read: of the files so far.
    """

    def __init__(self) -> None:
        self._database, self._lock, self._numbers = duckdb.connect(), Lock(), count()
        self._database.execute("SET temp_directory = ''")  # what it cannot hold is refused, not spilled to a file
        self._files: dict[str, _File] = {}
        self.bytes_read = 0

    def answer(self, runs: Sequence[RunEntry], question: str, parameters: Mapping[str, Any] = {}) -> pandas.DataFrame:
        """See ``vpmoe.runs.database.answer``."""
        with self._lock, readable(runs):
            tables = {run.id: f"FROM {table}" for run in runs if (table := self._up_to_date(run)) is not None}
            self._let_go(tables)
            self._database.execute(metrics_of(tables))
            return self._database.execute(question, {**parameters}).df()

    def _up_to_date(self, run: RunEntry) -> str | None:
        """The table with all whole lines of a run's metrics; None: it has none."""
        if not run.metrics.is_file():
            return None
        with run.metrics.open("rb") as stream:
            found = os.fstat(stream.fileno())
            identity, seen = (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)
            known = self._files.pop(run.id, None)
            if known is None or (known.seen != seen and not _goes_on(known, identity, found.st_size, stream)):
                self._drop(known)
                known = _File(f"records_{next(self._numbers)}", identity)
                self._database.execute(f"CREATE TABLE {known.table} (step BIGINT, tag VARCHAR, value DOUBLE)")
            self._files[run.id] = known  # the last one that was looked at
            if known.seen != seen:
                self._read_on(known, stream)
                known.seen = seen
        return known.table

    def _read_on(self, known: _File, stream: BinaryIO) -> None:
        stream.seek(known.end)
        while piece := stream.read(_PIECE_BYTES) + stream.readline():
            self.bytes_read += len(piece)
            if not (whole := piece[: piece.rfind(b"\n") + 1]):
                return
            # A file in memory, so that DuckDB reads a stretch of a file as it reads a whole one.
            with os.fdopen(os.memfd_create("records"), "wb") as memory:
                memory.write(whole)
                memory.flush()
                read = records_in(f"/proc/self/fd/{memory.fileno()}")
                self._database.execute(f"INSERT INTO {known.table} SELECT step, tag, value FROM ({read})")
            known.end += len(whole)
            known.tail = (known.tail + whole[-_TAIL_BYTES:])[-_TAIL_BYTES:]

    def _let_go(self, asked: Mapping[str, str]) -> None:
        for run in [run for run in self._files if run not in asked]:
            if sum(each.end for each in self._files.values()) <= _KEPT_BYTES:
                return
            self._drop(self._files.pop(run))

    def _drop(self, known: _File | None) -> None:
        if known is not None:
            self._database.execute(f"DROP TABLE {known.table}")


def _goes_on(known: _File, identity: tuple[int, int], size: int, stream: BinaryIO) -> bool:
    """Whether a file is the one that was read, with more at its end: that of a resumed run is not, nor a mended one."""
    if identity != known.identity or size <= known.end:
        return False
    stream.seek(known.end - len(known.tail))
    return stream.read(len(known.tail)) == known.tail
