"""The metrics of runs, asked in place: DuckDB reads every ``metrics.jsonl`` where it lies, also while it is written."""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
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
AXES = {"step": "step", "tokens": "tokens", "time": "seconds"}
"""What curves can be laid over, and the column of it."""

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
_METRICS = f"""CREATE VIEW metrics AS
WITH records AS (
  SELECT runs.run, read.step, read.tag, read.value
  FROM read_json($files, {_FORMAT}) read
  JOIN runs USING (file)
  WHERE read.step IS NOT NULL
),
places AS (
  SELECT run, step, max(value) FILTER (tag = '{TOKENS}') AS tokens, max(value) FILTER (tag = '{SECONDS}') AS seconds
  FROM records WHERE tag IN ('{TOKENS}', '{SECONDS}') GROUP BY run, step
)
SELECT run, step, tag, value, tokens, seconds FROM records LEFT JOIN places USING (run, step)"""
_NO_METRICS = """CREATE VIEW metrics AS SELECT NULL::VARCHAR AS run, NULL::BIGINT AS step, NULL::VARCHAR AS tag,
NULL::DOUBLE AS value, NULL::DOUBLE AS tokens, NULL::DOUBLE AS seconds WHERE false"""

# Of each run and tag: buckets of equally many points, of which the lowest, the highest and the ends stay.
_SERIES = """
WITH points AS (
  SELECT run, tag, {x}::DOUBLE AS x, value, row_number() OVER curve - 1 AS number,
    count(*) OVER (PARTITION BY run, tag) AS total
  FROM metrics WHERE list_contains($tags, tag) AND {x} IS NOT NULL
  WINDOW curve AS (PARTITION BY run, tag ORDER BY {x}, step)
),
placed AS (
  SELECT *, CASE WHEN total <= $points THEN number ELSE number * greatest($points // 2, 1) // total END AS bucket,
    isfinite(value) AS is_number
  FROM points
),
kept AS (
  SELECT run, tag, bucket, any_value(total) AS total, min(number) AS first, max(number) AS last,
    arg_min(number, value) FILTER (is_number) AS lowest, arg_max(number, value) FILTER (is_number) AS highest,
    min(number) FILTER (NOT is_number) AS broken
  FROM placed GROUP BY run, tag, bucket
)
SELECT run, tag, x, value FROM placed JOIN kept USING (run, tag, bucket)
WHERE number IN (lowest, highest, broken) OR number = 0 OR number = placed.total - 1
ORDER BY run, tag, number
"""


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


def answer(runs: Sequence[RunEntry], question: str, parameters: Mapping[str, Any] | None = None) -> pandas.DataFrame:
    """What a SELECT of ours gives over some runs.

    Raises:
        DataError: a file cannot be read.
    """
    try:
        with connected(runs) as database:
            return database.execute(question, dict(parameters or {})).df()
    except duckdb.Error as error:
        source = ", ".join(str(run.metrics) for run in runs[:3])
        raise DataError(f"metrics cannot be read: {error}", source=source, remedy="mend or move the file") from error


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
    database.execute(_METRICS.replace("$files", f"[{files}]") if files else _NO_METRICS)
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


def tags_of(runs: Sequence[RunEntry]) -> list[str]:
    """Every tag that one of the runs has recorded, sorted."""
    return list(answer(runs, "SELECT DISTINCT tag FROM metrics ORDER BY tag")["tag"])


def series(runs: Sequence[RunEntry], tags: Sequence[str], *, by: str = "step", points: int = 2000) -> pandas.DataFrame:
    """Curves: columns ``run`` (id), ``tag``, ``x`` and ``value``, in the order of x.

    Args:
        runs: whose metrics.
        tags: exact.
        by: "step", "tokens" or "time" (seconds); points that do not record where they lie are left out.
        points: a curve of more is thinned in DuckDB to about as many: of each stretch the lowest and the highest stay,
            the first that is no finite number, and the ends of the whole.

    Raises:
        DataError: ``by`` is none of them.
    """
    return answer(runs, _SERIES.format(x=axis(by)), {"tags": list(tags), "points": points})


def axis(by: str) -> str:
    """The column of an axis.

    Raises:
        DataError: there is no such axis.
    """
    if by not in AXES:
        raise DataError(f"there is no axis {by!r}", source="--by", remedy=f"one of {', '.join(AXES)}")
    return AXES[by]


def smoothed(curves: pandas.DataFrame, weight: float) -> pandas.DataFrame:
    """``series`` with ``value`` as its exponential moving average, unbiased at the start (Kingma and Ba 2014).

    Values and places that are no finite number are left out.

    Args:
        curves: for a true mean with every point: of a thinned curve the extremes are left.
        weight: of what came before, 0 to below 1.
    """
    import numpy as np

    finite = curves.loc[np.isfinite(curves["value"]) & np.isfinite(curves["x"]), :]
    if not weight or finite.empty:
        return finite
    means = finite.groupby(["run", "tag"], sort=False)["value"].transform(
        lambda values: values.ewm(alpha=1 - weight, adjust=True).mean()
    )
    return finite.assign(value=means)


def matching(patterns: Sequence[str], tags: Sequence[str]) -> list[str]:
    """The tags that a glob matches, in the order of the globs.

    Raises:
        DataError: a glob matches none; names near ones.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = [tag for tag in tags if fnmatch.fnmatchcase(tag, pattern)]
        if not found:
            near = ", ".join(difflib.get_close_matches(pattern, tags, n=5, cutoff=0.3) or tags[:5]) or "none at all"
            raise DataError(f"no metric matches {pattern!r}", source="--tags", remedy=f"there are: {near}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


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


def last_values(run: RunEntry) -> dict[str, float]:
    """The last value of each tag."""
    found = answer([run], "SELECT tag, arg_max(value, step) AS value FROM metrics GROUP BY tag ORDER BY tag")
    return dict(zip(found["tag"], map(float, found["value"]), strict=True))
