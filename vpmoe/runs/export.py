"""The metrics of runs in a file of their own: CSV, Parquet or JSONL, written by DuckDB."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import duckdb

from megatron_vpmoe.files import move_into_place
from vpmoe.errors import DataError, NotOursError
from vpmoe.runs.database import connected
from vpmoe.runs.registry import RunEntry

FORMATS = {
    ".csv": "FORMAT csv, HEADER",
    ".parquet": "FORMAT parquet, COMPRESSION zstd",
    ".jsonl": "FORMAT json",
}
"""Suffix of the file -> how DuckDB writes it."""


def export(runs: Sequence[RunEntry], output: Path, tags: Sequence[str] | None = None) -> int:
    """Write the records of runs: columns run (id), name, step, tag, value, tokens, seconds; returns how many.

    In JSONL a value that is no finite number is a string, as in ``metrics.jsonl``.

    Args:
        runs: whose records.
        output: a new file, whose suffix says the format.
        tags: of these alone, exact; None: all.

    Raises:
        DataError: another suffix, or the file cannot be written.
        NotOursError: something lies there already.
    """
    if output.suffix not in FORMATS:
        raise DataError(f"no format for {output.name!r}", source=str(output), remedy=f"end it in {', '.join(FORMATS)}")
    if os.path.lexists(output):
        raise NotOursError("here lies a file already", source=str(output), remedy="move it away, or name another")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    value = (
        "value"
        if output.suffix != ".jsonl"
        else "CASE WHEN isfinite(value) THEN to_json(value) ELSE to_json(value::VARCHAR) END"
    )
    chosen = "" if tags is None else "WHERE list_contains($tags, tag)"
    rows = f"""SELECT run, name, step, tag, {value} AS value, tokens, seconds FROM metrics
    JOIN (SELECT run, name FROM runs) USING (run) {chosen} ORDER BY name, run, step, tag"""
    place = str(temporary).replace("'", "''")
    try:
        with connected(runs) as database:
            copied = database.execute(
                f"COPY ({rows}) TO '{place}' ({FORMATS[output.suffix]})", {} if tags is None else {"tags": list(tags)}
            ).fetchall()
        move_into_place(temporary, output)
    except duckdb.Error as error:
        raise DataError(f"cannot write it: {error}", source=str(output), remedy="make room, or name another") from error
    finally:
        temporary.unlink(missing_ok=True)
    return copied[0][0]
