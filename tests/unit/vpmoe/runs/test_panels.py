"""The figures of a training show what was recorded, by their definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.unit.vpmoe.runs.written_runs import write_run
from vpmoe.errors import DataError
from vpmoe.runs import plots
from vpmoe.runs.panels import FIGURES, of_figure, of_figures
from vpmoe.runs.queries import tags_of
from vpmoe.runs.registry import RunEntry, list_runs


@pytest.fixture
def runs(tmp_path: Path) -> list[RunEntry]:
    store = tmp_path / "registry.sqlite"
    for name, shift in (("a", 0.5), ("b", 2.0)):
        directory = write_run(store, name, loss=lambda step: 10.0 - step / 20)
        with (directory / "metrics.jsonl").open("a") as stream:
            for step in (20, 40, 60):
                record = {"step": step, "tag": "valid/loss/total", "value": 10 - step / 20 + shift}
                stream.write(json.dumps(record) + "\n")
    return list_runs(store)


def lines_of(runs: list[RunEntry], name: str, monkeypatch: pytest.MonkeyPatch, **how) -> list[dict[str, np.ndarray]]:
    """The lines of each field of a figure by their labels, as they are drawn."""
    figures = []
    monkeypatch.setattr(plots, "save_picture", lambda figure, output: figures.append(figure))
    plots.plot(runs, of_figures([name], tags_of(runs)), Path("none.png"), **how)
    return [
        {label: np.array(line.get_xydata()) for line in field.get_lines() if (label := str(line.get_label()))[0] != "_"}
        for field in figures[0].axes
        if field.get_title()
    ]


def test_the_gap_is_valid_minus_train_at_the_steps_of_evaluation(
    runs: list[RunEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    (field,) = lines_of(runs, "train_valid_gap", monkeypatch)
    assert field["a"].tolist() == [[20, 0.5], [40, 0.5], [60, 0.5]]
    assert field["b"].tolist() == [[20, 2.0], [40, 2.0], [60, 2.0]]
    (smooth,) = lines_of(runs, "train_valid_gap", monkeypatch, smoothing=0.9)
    # Of a line that falls, the average of what came before lies above: the gap is narrower by as much.
    weights = 0.9 ** np.arange(60)
    behind = (weights * np.arange(60)).sum() / weights.sum() / 20
    assert smooth["a"][-1].tolist() == pytest.approx([60, 0.5 - behind])


def test_the_summary_has_train_and_valid_in_one_field(runs: list[RunEntry], monkeypatch: pytest.MonkeyPatch) -> None:
    loss, rate = lines_of(runs, "training_summary", monkeypatch)  # no gradient norm and no speed were recorded
    assert set(loss) == {"a, train", "b, train", "a, valid", "b, valid"}
    assert len(loss["a, train"]) == 100 and len(loss["a, valid"]) == 3
    assert (rate["b"][:, 1] == 0.01).all()


def test_of_a_blend_every_dataset_has_a_curve() -> None:
    there = ["loss/total", "valid/a/loss/total", "valid/b/loss/total"]
    (panel,) = of_figure("train_valid_gap", there)
    assert [(curve.tag, curve.label) for curve in panel.curves] == [(tag, tag) for tag in there[1:]]
    assert of_figure("train_valid_gap", there[1:]) == []  # nothing to take off


def test_a_field_of_two_figures_is_drawn_once_and_nothing_to_show_is_refused() -> None:
    there = ["loss/total", "valid/loss/total", "lr", "grad_norm", "throughput/tokens_per_second"]
    panels = of_figures([name for name in FIGURES if name != "max_load"], there)
    assert [panel.title for panel in panels] == [
        *("loss", "learning rate", "gradient norm", "tokens/s", "loss, valid minus train"),
    ]
    with pytest.raises(DataError, match="max_load_pct"):
        of_figures(["max_load"], there)
