"""Reports are whole, and of the kind that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpmoe.errors import DataError
from vpmoe.eval.reports import read_report, write_report


def test_round_trip(tmp_path: Path) -> None:
    report = {"kind": "x", "provenance": {"git": None}, "text": "π", "values": [1, 0.1, None]}
    path = tmp_path / "a" / "report.json"
    write_report(path, report)
    assert read_report(path, "x") == report
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", [None, "{", '{"kind": "y"}', "[]"])
def test_unusable_reports_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_report(path, "x")
    assert caught.value.source == str(path)
