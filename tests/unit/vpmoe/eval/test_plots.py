"""The picture of a run is written whole, and needs no tag in particular."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vpmoe.errors import DataError
from vpmoe.eval.plots import ROUTER_TAG, plot_run, read_curves

ENTRY = {"n": 4, "valid": 3, "validity": 0.75, "exact": 2, "accuracy": 0.5}
TASKS = {"addition": ENTRY, "sorting": ENTRY, "all": ENTRY}
CURVES = {"loss/analysis": [(1, 3.0), (2, 2.0)], "valid/loss/final": [(2, 1.0)], ROUTER_TAG: [(1, 50.0), (2, 40.0)]}


@pytest.mark.parametrize("curves", [CURVES, {}, {"loss/final": [(1, 1.0)]}, {"loss/total": [(1, 1.0)]}])
def test_png_is_written(tmp_path: Path, curves: dict) -> None:
    output = tmp_path / "deep" / "report.png"
    plot_run(curves, TASKS, output, title="a run")
    assert output.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in output.parent.iterdir()] == ["report.png"]


def test_same_run_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_run(CURVES, TASKS, tmp_path / name, title="a run")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_curves_by_tag(tmp_path: Path) -> None:
    records = [(10, "loss/final", 2.0), (10, "lr", 0.1), (20, "loss/final", 1.5)]
    lines = [json.dumps({"step": step, "tag": tag, "value": value}) for step, tag, value in records]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert read_curves(path) == {"loss/final": [(10, 2.0), (20, 1.5)], "lr": [(10, 0.1)]}


def test_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no metrics"):
        read_curves(tmp_path / "metrics.jsonl")
