"""Records as lines of JSON: ``{"step": 10, "tag": "loss/total", "value": 2.5}``, flushed after every step.

A value that JSON has no number for is a string that Python's ``float`` reads: "nan", "inf", "-inf".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.files import json_line, naming, read_json_lines, sync, write_atomically
from megatron_vpmoe.metrics.records import Record

METRICS = "metrics.jsonl"
"""In a run's directory."""


class JsonlSink:
    """Appends to a file of records.

    Args:
        path: the file; made if absent, with its folder.
        kept: what it holds at first, of ``records_until``; an existing file is replaced atomically.
    """

    def __init__(self, path: Path, kept: Sequence[Record] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            write_atomically(path, _lines(kept).encode())
        self._path = path
        self._stream = path.open("a", encoding="utf-8")
        sync(path.parent)

    def write(self, records: Sequence[Record]) -> None:
        """Append the records and hand them to the operating system."""
        with naming(self._path):
            self._stream.write(_lines(records))
            self._stream.flush()

    def sync(self) -> None:
        """Have every record on disk."""
        sync(self._path)

    def close(self, failure: str | None = None) -> None:
        """Close the file."""
        with naming(self._path):  # what could not be written is tried again
            self._stream.close()


def read_records(path: Path) -> list[Record]:
    """All records of a file, in its order; an unfinished last line is left out.

    Raises:
        DataError: a finished line is not a record.
    """
    records = []
    for number, value in read_json_lines(path):
        try:
            step = int(value["step"])
            if step.bit_length() > 63:  # no column of a database holds it
                raise OverflowError
            records.append(Record(step, str(value["tag"]), float(value["value"])))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"line {number} is not a record: {str(value)[:80]}",
                source=f"{path}:{number}",
                remedy='remove the line, or the file; a record is {"step": 1, "tag": "name", "value": 0.5}',
            ) from error
    return records


def records_until(path: Path, step: int) -> list[Record]:
    """Those that a run which goes on from ``step`` keeps; none where there is no file.

    Later steps will be done again, and a last line that a killed process left unfinished is none.

    Raises:
        DataError: the file holds something other than records.
    """
    return [record for record in read_records(path) if record.step <= step] if path.exists() else []


def _lines(records: Iterable[Record]) -> str:
    return "".join(
        json_line({"step": step, "tag": tag, "value": value if math.isfinite(value) else str(value)})
        for step, tag, value in records
    )
