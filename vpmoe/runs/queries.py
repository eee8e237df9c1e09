"""The usual questions about the metrics of runs: tags, curves, last values."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vpmoe.errors import DataError
from vpmoe.runs.database import Answer, answer
from vpmoe.runs.registry import RunEntry

if TYPE_CHECKING:
    import pandas

AXES = {"step": "step", "tokens": "tokens", "time": "seconds"}
"""What curves can be laid over, and the column of it."""

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


def tags_of(runs: Sequence[RunEntry], *, answer: Answer = answer) -> list[str]:
    """Every tag that one of the runs has recorded, sorted."""
    return list(answer(runs, "SELECT DISTINCT tag FROM metrics ORDER BY tag", {})["tag"])


def series(
    runs: Sequence[RunEntry], tags: Sequence[str], *, by: str = "step", points: int = 2000, answer: Answer = answer
) -> pandas.DataFrame:
    """Curves: columns ``run`` (id), ``tag``, ``x`` and ``value``, in the order of x.

    Args:
        runs: whose metrics.
        tags: exact.
        by: "step", "tokens" or "time" (seconds); points that do not record where they lie are left out.
        points: a curve of more is thinned in DuckDB to about as many: of each stretch the lowest and the highest stay,
            the first that is no finite number, and the ends of the whole.
        answer: who is asked; the files by default.

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


def last_values(run: RunEntry) -> dict[str, float]:
    """The last value of each tag."""
    found = answer([run], "SELECT tag, arg_max(value, step) AS value FROM metrics GROUP BY tag ORDER BY tag")
    return dict(zip(found["tag"], map(float, found["value"]), strict=True))
