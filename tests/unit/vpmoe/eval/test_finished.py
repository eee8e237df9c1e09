"""Damage in a report or its items is told with file and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.vpmoe.eval.written_reports import write_choices
from vpmoe.errors import DataError
from vpmoe.eval.suites.finished import Finished


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_choices(tmp_path / "r.json", "a", {"x": [True, False, True]})


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda report: report.update(kind="ladder"), "kind 'ladder'"),
        (lambda report: report.update(schema_version=2), "schema_version"),
        (lambda report: report.pop("suite"), "suite is missing"),
        (lambda report: report["checkpoint"].update(run=None), "checkpoint.run"),
        (lambda report: report.update(tasks={}), "tasks"),
        (lambda report: report["tasks"]["x"].update(accuracy="high"), "tasks.x.accuracy"),
        (lambda report: report["tasks"]["x"].update(accuracy=float("nan")), "tasks.x.accuracy"),
        (lambda report: report["tasks"]["x"].update(interval=[1]), "tasks.x.interval"),
        (lambda report: report["tasks"]["x"].update(chance=1), "tasks.x.chance"),
        (lambda report: report["means"]["core8_centered_mean"].pop("value"), "means.core8_centered_mean.value"),
        (lambda report: report["means"]["core8_centered_mean"].update(tasks=["y"]), "there is no task 'y'"),
    ],
)
def test_a_damaged_report(edit: Callable, field: str, path: Path) -> None:
    report = json.loads(path.read_text())
    edit(report)
    path.write_text(json.dumps(report))
    with pytest.raises(DataError, match=field) as error:
        Finished.read(path)
    assert error.value.source == str(path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[]", "no item"),
        ("{", "not JSON"),
        ('{"item": 7, "correct": true}', "task = None"),
        ('{"task": "x", "item": [], "correct": true}', r"item = \[\]"),
        ('{"task": "x", "item": 1, "correct": true}', "item 1 of x stands here a second time"),
        ('{"task": "x", "item": 2, "correct": "yes"}', "item 2 of x: correct = 'yes'"),
        ('{"task": "y", "item": 2, "correct": true}', "2 items of x, and the report counts 3"),
    ],
)
def test_damaged_items(line: str, told: str, path: Path) -> None:
    items = path.with_suffix(".items.jsonl")
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:2]) + line + "\n")
    with pytest.raises(DataError, match=told) as error:
        _ = Finished.read(path).items
    assert str(items) in str(error.value)
