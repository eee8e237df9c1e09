"""Runs beside each other: where their configurations and origins differ, and their curves at common points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vpmoe.runs.database import answer
from vpmoe.runs.queries import axis
from vpmoe.runs.registry import RunEntry

if TYPE_CHECKING:
    import pandas

ABSENT = "(absent)"

# Points that all the runs of a tag have reached, and of each run the last value up to there.
_OVERLAY = """
WITH curves AS (
  SELECT run, tag, {x}::DOUBLE AS x, value FROM metrics WHERE list_contains($tags, tag) AND {x} IS NOT NULL
),
ends AS (SELECT run, tag, min(x) AS low, max(x) AS high FROM curves GROUP BY run, tag),
spans AS (SELECT tag, max(low) AS low, min(high) AS high FROM ends GROUP BY tag),
asked AS (
  SELECT DISTINCT ends.run, spans.tag, spans.low + (spans.high - spans.low) * number / greatest($points - 1, 1) AS at
  FROM spans JOIN ends USING (tag), range($points) AS counted(number) WHERE spans.high >= spans.low
)
SELECT asked.tag, asked.at AS x, asked.run, curves.value
FROM asked ASOF LEFT JOIN curves ON asked.run = curves.run AND asked.tag = curves.tag AND asked.at >= curves.x
ORDER BY asked.tag, asked.at, asked.run
"""


def config_differences(runs: Sequence[RunEntry]) -> list[tuple[str, list[Any]]]:
    """The fields that are not the same in all runs: (key, the value in each run), in the order of the configuration."""
    keys = dict.fromkeys(
        f"{section}.{name}" for run in runs for section, values in run.config.items() for name in values
    )
    table = [(key, [_value(run, *key.split(".", 1)) for run in runs]) for key in keys]
    return [(key, values) for key, values in table if any(value != values[0] for value in values)]


def origin_differences(runs: Sequence[RunEntry]) -> list[tuple[str, list[Any]]]:
    """As ``config_differences``, of what the runs come from: code, data, vocabulary, packages, hardware."""
    origins = [_flat(run.provenance) for run in runs]
    keys = dict.fromkeys(key for origin in origins for key in origin if key != "config_hash")
    table = [(key, [origin.get(key, ABSENT) for origin in origins]) for key in keys]
    return [(key, values) for key, values in table if any(value != values[0] for value in values)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def overlay(runs: Sequence[RunEntry], tags: Sequence[str], *, by: str = "step", points: int = 10) -> pandas.DataFrame:
    """Values of runs at points that all of those with the tag have reached: columns tag, x, run (id), value.

    Args:
        runs: to compare.
        tags: exact.
        by: as for ``queries.series``.
        points: from the first common one to the last; the value is the last one recorded up to there.

    Raises:
        DataError: there is no such axis.
    """
    return answer(runs, _OVERLAY.format(x=axis(by)), {"tags": list(tags), "points": points})


def _value(run: RunEntry, section: str, name: str) -> Any:
    return run.config.get(section, {}).get(name, ABSENT)
