"""Ladder and evaluation: reports as tables and plots."""

from __future__ import annotations

from itertools import groupby

import streamlit

from vpmoe.app.found_reports import (
    Found,
    field_rows,
    find_reports,
    ladder_chart,
    line_rows,
    overview_of,
    task_chart,
)
from vpmoe.app.places import Places
from vpmoe.app.shown import empty, label, path_label, table, text

_COLUMNS = 3
_NOT_DRAWN = ("rung", "object", "job")


def show(places: Places) -> None:
    """The page."""
    found = find_reports(places.reports)
    for words in found.refused:
        streamlit.warning("A report cannot be read.")
        streamlit.code(words, language=None, wrap_lines=True)
    if not (found.suites or found.ladders or found.others):
        empty(
            "No report is there yet. Make one, or name where some are:",
            "vpmoe eval canaries runs/NAME",
            "vpmoe eval core8 runs/NAME",
            "vpmoe ladder configs/nano/ladder.toml",
            "vpmoe app --reports FOLDER",
        )
        return
    views = {"Evaluation": _suites, "Ladder": _ladders, "Other reports": _others}
    filled = [name for name, has in zip(views, (found.suites, found.ladders, found.others), strict=True) if has]
    view = streamlit.segmented_control("View", filled, default=filled[0], required=True, label_visibility="collapsed")
    views[view or filled[0]](found)


def _suites(found: Found) -> None:
    overview, fault = overview_of(found.suites)
    if fault is not None:
        streamlit.warning("Reports are shown without what changed between them: their items cannot be read.")
        streamlit.code(fault, language=None, wrap_lines=True)
    for suite, lines in groupby(overview.lines, lambda line: line.suite):
        mine = [*lines]
        streamlit.subheader("Suite", anchor=False)
        text(suite)
        tasks = [[*some] for _, some in groupby(mine, lambda line: line.name)]
        columns = streamlit.columns(_COLUMNS)
        for place, of_task in enumerate(tasks):
            columns[place % _COLUMNS].altair_chart(task_chart(of_task), width="stretch")
        table(line_rows(mine))
    for note in overview.notes:
        text(note)


def _ladders(found: Found) -> None:
    for path, rows in found.ladders:
        streamlit.subheader("Ladder", anchor=False)
        text(str(path))
        if not rows:
            streamlit.info("No object of this ladder has been evaluated.")
            continue
        drawn = [name for name in rows[0] if name not in _NOT_DRAWN]
        columns = streamlit.columns(_COLUMNS)
        for place, name in enumerate(drawn):
            columns[place % _COLUMNS].altair_chart(ladder_chart(rows, name), width="stretch")
        table(rows)


def _others(found: Found) -> None:
    names = [f"{label(report['kind'])}: {path_label(str(path))}" for path, report in found.others]
    chosen = streamlit.selectbox("Report", range(len(names)), format_func=names.__getitem__, key="report_other")
    table(field_rows(found.others[chosen][1]), height=600)
