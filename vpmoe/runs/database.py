"""The metrics of runs, asked in place: DuckDB reads every ``metrics.jsonl`` where it lies, also while it is written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow

from megatron_vpmoe.errors import is_utf8
from vpmoe.errors import DataError
from vpmoe.runs.registry import RunEntry, list_runs

if TYPE_CHECKING:
    import pandas

TOKENS, SECONDS = "elapsed/tokens", "elapsed/seconds"
"""Tags that the trainer records once a step."""
_RUNS = """CREATE TABLE runs (
  run VARCHAR, name VARCHAR, experiment VARCHAR, status VARCHAR, started TIMESTAMP, ended TIMESTAMP, last_step BIGINT,
  directory VARCHAR, host VARCHAR, pid BIGINT, world_size BIGINT, error VARCHAR, tags VARCHAR[], note VARCHAR,
  git VARCHAR, config JSON, provenance JSON, results MAP(VARCHAR, DOUBLE), file VARCHAR
)"""
_TEXT, _COUNT, _TIME = pyarrow.string(), pyarrow.int64(), pyarrow.timestamp("us")
_ARROW = pyarrow.schema(
    [
        *((name, _TEXT) for name in ("run", "name", "experiment", "status")),
        *(("started", _TIME), ("ended", _TIME), ("last_step", _COUNT), ("directory", _TEXT), ("host", _TEXT)),
        *(("pid", _COUNT), ("world_size", _COUNT), ("error", _TEXT), ("tags", pyarrow.list_(_TEXT)), ("note", _TEXT)),
        *((name, _TEXT) for name in ("git", "config", "provenance")),
        *(("results", pyarrow.map_(_TEXT, pyarrow.float64())), ("file", _TEXT)),
    ]
)
# Not partitioned: below a folder such as "value=3" every value would be 3.
_FORMAT = (
    "format = 'newline_delimited', columns = {step: 'BIGINT', tag: 'VARCHAR', value: 'DOUBLE'}, filename = 'file', "
    "ignore_errors = true, hive_partitioning = false"
)
# A last line that is still being written, or that a kill has cut, is a row of nulls.
_RECORDS = f"SELECT file, step, tag, value FROM read_json([$files], {_FORMAT}) read WHERE step IS NOT NULL"
_OF_RUNS = f"SELECT runs.run, read.step, read.tag, read.value FROM ({_RECORDS}) read JOIN runs USING (file)"
_NOTHING = "SELECT NULL::VARCHAR AS run, NULL::BIGINT AS step, NULL::VARCHAR AS tag, NULL::DOUBLE AS value WHERE false"
_METRICS = f"""CREATE OR REPLACE VIEW metrics AS
WITH records AS ($records),
places AS (
  SELECT run, step, max(value) FILTER (tag = '{TOKENS}') AS tokens, max(value) FILTER (tag = '{SECONDS}') AS seconds
  FROM records WHERE tag IN ('{TOKENS}', '{SECONDS}') GROUP BY run, step
)
SELECT run, step, tag, value, tokens, seconds FROM records LEFT JOIN places USING (run, step)"""
Answer = Callable[["Sequence[RunEntry]", str, Mapping[str, Any]], "pandas.DataFrame"]
"""What a SELECT over ``metrics`` gives over some runs, with its parameters."""


def connect(store: Path | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory database with what the runs of a store are and measured.

    ``runs``: one row a run as it is now, ``run`` being its id. ``metrics``: (run, step, tag, value, tokens, seconds),
    a view over the files; ``tokens`` and ``seconds`` say where the step lies, NULL in runs that do not record it.

    Raises:
        NotOursError, DataError, BusyError: as ``registry.list_runs``.
    """
    return connected(list_runs(store))


def ask(sql: str, store: Path | None = None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Columns and rows of one SELECT over ``runs`` and ``metrics``; it can neither write nor read other files.

    Raises:
        DataError: it is none, or DuckDB cannot answer it; and as :func:`connect`.
    """
    runs = list_runs(store)
    database = connected(runs)
    remedy = "DESCRIBE runs and DESCRIBE metrics show the columns; docs/runs.md has examples"
    # Nothing is written beside the query either: what outgrows the memory is refused, not spilled to a file.
    database.execute("SET temp_directory = ''; SET autoinstall_known_extensions = false")
    database.execute(
        f"SET allowed_paths = [{_literals(text for path in _there(runs) for text in (path, _alone(path)))}]"
    )
    database.execute("SET enable_external_access = false; SET lock_configuration = true")
    try:
        statements = database.extract_statements(sql)
        kinds = [statement.type for statement in statements]
        if kinds != [duckdb.StatementType.SELECT]:
            told = ", ".join(kind.name for kind in kinds) or "nothing"
            raise DataError(f"one SELECT is answered, and this is {told}", source=sql, remedy=remedy)
        answer = database.execute(sql)
        return [column[0] for column in answer.description or ()], answer.fetchall()
    except duckdb.Error as error:
        raise DataError(str(error).strip(), source="the SQL given", remedy=remedy) from error


def answer(runs: Sequence[RunEntry], question: str, parameters: Mapping[str, Any] = {}) -> pandas.DataFrame:
    """What a SELECT of ours gives over some runs.

    Raises:
        DataError: a file cannot be read.
    """
    with readable(runs), connected(runs) as database:
        return database.execute(question, {**parameters}).df()


@contextmanager
def readable(runs: Sequence[RunEntry]) -> Iterator[None]:
    """What DuckDB finds wrong with the files of runs, as a DataError."""
    try:
        yield
    except duckdb.Error as error:
        source = ", ".join(str(run.metrics) for run in runs[:3])
        raise DataError(f"metrics cannot be read: {error}", source=source, remedy="mend or move the file") from error


def records_in(*paths: str) -> str:
    """A SELECT of ``file``, ``step``, ``tag`` and ``value`` of what is a record in some files."""
    return _RECORDS.replace("$files", _literals(map(_alone, paths)))


def metrics_of(records: Mapping[str, str]) -> str:
    """The statement that makes the view ``metrics`` of SELECTs of ``step``, ``tag`` and ``value`` by id of the run."""
    return _METRICS.replace(
        "$records",
        " UNION ALL ".join(f"SELECT {_literals([run])} AS run, * FROM ({each})" for run, each in records.items())
        or _NOTHING,
    )


def connected(runs: Sequence[RunEntry]) -> duckdb.DuckDBPyConnection:
    """``connect`` over some runs.

    Raises:
        DataError: a run's directory is not UTF-8.
    """
    for run in runs:
        if not is_utf8(str(run.directory)):
            raise DataError(
                "the run's directory is not UTF-8, and DuckDB opens no such",
                source=ascii(str(run.directory)),
                remedy="rename the folder",
            )
    database = duckdb.connect()
    database.execute("SET TimeZone = 'UTC'")
    database.execute(_RUNS)
    if runs:  # in one piece: row by row takes milliseconds each
        columns = zip(*map(_row, runs), strict=True)
        names = database.table("runs").columns
        table = pyarrow.table(dict(zip(names, map(list, columns), strict=True)), schema=_ARROW)
        database.register("given", table).execute("INSERT INTO runs SELECT * FROM given").unregister("given")
    files = _files(runs)
    database.execute(_METRICS.replace("$records", _OF_RUNS.replace("$files", files) if files else _NOTHING))
    return database


def _there(runs: Sequence[RunEntry]) -> list[str]:
    return sorted({str(run.metrics) for run in runs if os.path.isfile(run.metrics)})


def _files(runs: Sequence[RunEntry]) -> str:
    """The metrics that are there, as DuckDB's literals."""
    return _literals(map(_alone, _there(runs)))


def _alone(path: str) -> str:
    """DuckDB's pattern that matches this path and no other."""
    return re.sub(r"[*?[]", r"[\g<0>]", path)


def _literals(texts: Iterable[str]) -> str:
    return ", ".join("'" + text.replace("'", "''") + "'" for text in texts)


def _row(run: RunEntry) -> list[object]:
    import datetime

    def at(seconds: float | None) -> datetime.datetime | None:
        return None if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC).replace(tzinfo=None)

    git = run.provenance.get("git") or {}
    return [
        *(run.id, run.name, run.experiment, run.status, at(run.started), at(run.ended), run.step),
        *(str(run.directory), run.host, run.pid, run.world_size, run.error, list(run.tags), run.note),
        *(
            git.get("sha"),
            json.dumps(run.config),
            json.dumps(run.provenance),
            list(run.results.items()),
            str(run.metrics),
        ),
    ]


def damaged_lines(run: RunEntry) -> int:
    """Lines of its metrics that are no records, but for a last one that is not finished."""
    if not run.metrics.is_file():
        return 0
    question = f"SELECT count(*) FROM read_json([{_files([run])}], {_FORMAT}) read WHERE read.step IS NULL"
    with duckdb.connect() as database:
        (found,) = database.execute(question).fetchall()[0]
    with run.metrics.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 1))
        return max(0, found - (stream.read() not in (b"", b"\n")))
