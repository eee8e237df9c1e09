"""Reports for a page: of suites, of ladders and of whatever else says its kind, each read by who wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas

from megatron_vpmoe.files import read_json
from vpmoe.app.shown import label
from vpmoe.errors import DataError, VpmoeError
from vpmoe.eval.suites.finished import Finished
from vpmoe.eval.suites.overview import Line, Overview, in_order
from vpmoe.eval.suites.suite_report import KIND as SUITE
from vpmoe.ladder.report import KIND as LADDER

if TYPE_CHECKING:
    import altair


@dataclass
class Found:
    """What lies at some places.

    Attributes:
        suites: of evaluation suites, in the order of their paths.
        ladders: path of each ladder's report, and its rows (``ladder_rows``).
        others: path and content of what is of another kind.
        refused: what could not be read, and why.
    """

    suites: list[Finished] = field(default_factory=list)
    ladders: list[tuple[Path, list[dict[str, Any]]]] = field(default_factory=list)
    others: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def find_reports(places: Sequence[Path]) -> Found:
    """Read every report at ``places``, files or folders; one that is damaged hides no other."""
    found = Found()
    for path in in_order(places):
        try:
            content = read_json(path)
            kind = content.get("kind")
            if kind == SUITE:
                found.suites.append(Finished.read(path))
            elif kind == LADDER:
                found.ladders.append((path, ladder_rows(content, path)))
            elif isinstance(kind, str):
                found.others.append((path, content))
        except VpmoeError as error:
            found.refused.append(f"{path}: {error}")
    return found


def overview_of(suites: Sequence[Finished]) -> tuple[Overview, str | None]:
    """All suites held against each other; with damaged items each alone, and why."""
    try:
        return Overview.of(suites), None
    except VpmoeError as error:
        lines = [
            Line(one.report.suite, name, one.label, row, None, None) for one in suites for name, row in one.rows.items()
        ]
        return Overview(tuple(lines), ()), str(error)


def line_rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row a number, as the command's table has it."""
    headings = ("task", "measure", "checkpoint", "n", "value", "95 %", "Δ", "95 % of Δ", "Δ is")
    return [dict(zip(headings, line.cells, strict=True)) for line in lines]


def task_chart(lines: Sequence[Line]) -> altair.LayerChart | altair.FacetChart:
    """A task's number over the checkpoints, with its 95 % interval."""
    import altair

    frame = pandas.DataFrame(
        {
            "checkpoint": [label(line.label) for line in lines],
            "value": [line.row.value for line in lines],
            "low": [line.row.value if line.row.interval is None else line.row.interval[0] for line in lines],
            "high": [line.row.value if line.row.interval is None else line.row.interval[1] for line in lines],
        }
    )
    named = altair.Title(label(f"{lines[0].name}, {lines[0].row.measure}"), anchor="start", fontSize=13)
    base = altair.Chart(frame, title=named).encode(
        x=altair.X("checkpoint:N", sort=None, title=None, axis=altair.Axis(labelAngle=-20))
    )
    scale = altair.Scale(zero=False)
    points = base.mark_line(point=True).encode(
        y=altair.Y("value:Q", title=None, scale=scale),
        tooltip=["checkpoint:N", *(altair.Tooltip(f"{name}:Q", format=".4f") for name in ("value", "low", "high"))],
    )
    bars = base.mark_rule(color="gray").encode(y=altair.Y("low:Q", title=None, scale=scale), y2="high:Q")
    return altair.layer(bars, points, height=220)


def ladder_rows(report: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """A row an object of a ladder, from the bottom: the numbers of its evaluation.

    Raises:
        DataError: something is not as a ladder writes it.
    """
    try:
        return [_ladder_row(record) for record in report["steps"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"no ladder's report: {type(error).__name__}: {error}", source=str(path), remedy="make it again"
        ) from error


def _ladder_row(record: dict[str, Any]) -> dict[str, Any]:
    found = record["evaluation"]
    numbers = {
        "bits/byte": found["texts"]["bits_per_byte"],
        "nats/token": found["texts"]["nats_per_token"],
        "exact, %": round(100 * found["questions"]["accuracy"], 1),
        **{name: suite["value"] for name, suite in record.get("suites", {}).items()},
        "job, s": record["job_time"]["seconds"],
    }
    if wrong := [name for name, value in numbers.items() if not isinstance(value, int | float | None)]:
        raise ValueError(f"{wrong[0]} is no number")
    return {**{name: str(record[name]) for name in ("rung", "object", "job")}, **numbers}


def ladder_chart(rows: Sequence[dict[str, Any]], column: str) -> altair.Chart:
    """One number over the objects, in the order of making."""
    import altair

    frame = pandas.DataFrame(
        {"object": [label(row["object"]) for row in rows], "rung": [row["rung"] for row in rows]}
    ).assign(value=[row.get(column) for row in rows])
    return (
        altair.Chart(frame, title=altair.Title(label(column), anchor="start", fontSize=13))
        .mark_line(point=True)
        .encode(
            x=altair.X("object:N", sort=None, title=None, axis=altair.Axis(labelAngle=-30)),
            y=altair.Y("value:Q", title=None, scale=altair.Scale(zero=False)),
            tooltip=["object:N", "rung:O", altair.Tooltip("value:Q", format=".4f")],
        )
        .properties(height=240)
    )


def field_rows(content: Any, place: str = "") -> list[dict[str, Any]]:
    """Every number, text and flag of a report by its place, such as ``speed.tokens_per_second``."""
    if isinstance(content, dict):
        return [
            row for name, value in content.items() for row in field_rows(value, f"{place}.{name}" if place else name)
        ]
    if isinstance(content, list):
        return [row for at, value in enumerate(content) for row in field_rows(value, f"{place}[{at}]")]
    return [{"field": place, "value": str(content)}]
