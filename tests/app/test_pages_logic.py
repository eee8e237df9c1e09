"""What pages compute and how they show what others wrote, without a browser."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas
import pytest

from megatron_vpmoe.errors import BusyError, ConfigError, DataError
from megatron_vpmoe.metrics.expert_loads import ExpertLoads
from tests.app.app_world import HOSTILE
from tests.unit.vpmoe.runs.written_runs import write_run
from vpmoe.app import curves, datasets, found_reports, run_files
from vpmoe.app.loads import dead_experts, heatmap, measured
from vpmoe.app.places import Places
from vpmoe.app.serve import free_port, is_loopback
from vpmoe.app.shown import coloured, distinct, label, path_label
from vpmoe.app.store import smoothed_now
from vpmoe.cli import main
from vpmoe.runs.queries import smoothed
from vpmoe.runs.registry import list_runs


@pytest.mark.parametrize("text", HOSTILE)
def test_html_of_any_text_is_text(text: str) -> None:
    page = coloured([(text, "1,2,3", text)])
    assert page.count("<") == 4  # a block and a span
    assert page.encode() and not set(page) & {"\u202e", "\u200b", "\x1b", "\x00"}
    assert len(label(text)) <= 60 and "\n" not in label(text) and label(text).encode()
    assert len(path_label(text)) <= 60 and "\n" not in path_label(text) and path_label(text).encode()


def test_runs_of_one_name_are_told_apart() -> None:
    folders = [f"/data/{'deep/' * 20}{name}" for name in ("one", "two")]
    assert [path_label(folder)[-8:] for folder in folders] == ["deep/one", "deep/two"]
    assert distinct(["a", "b", "a"], ["id0001x", "id2", "id0003x"]) == ["a (id0001)", "b", "a (id0003)"]


def frame(values: list[float], tag: str = "loss/total") -> pandas.DataFrame:
    return pandas.DataFrame({"run": "r", "tag": tag, "x": np.arange(len(values), dtype=float), "value": values})


def test_smoothing_is_a_debiased_average_of_each_curve_alone() -> None:
    two = pandas.concat([frame([4.0, 2.0, 2.0]), frame([10.0, 0.0], "lr")])
    smooth = smoothed(two, 0.5)
    assert smooth["value"].tolist() == pytest.approx(
        [4.0, (2 + 0.5 * 4) / 1.5, (2 + 1 + 1) / 1.75, 10.0, 10 * 0.5 / 1.5]
    )
    assert smoothed(two, 0.0)["value"].tolist() == two["value"].tolist()
    broken = frame([1.0, math.nan, math.inf, 3.0])
    assert curves.not_finite(broken) == 2 and smoothed(broken, 0.9)["x"].tolist() == [0.0, 3.0]


def test_a_long_smooth_curve_is_the_mean_of_all_its_points(tmp_path: Path) -> None:
    """Not of what thinning leaves: here the extremes of each stretch, whose mean is 50 and not 1."""
    store = tmp_path / "runs" / "registry.sqlite"
    write_run(store, "a", steps=4000, loss=lambda step: 100.0 if step % 100 == 0 else 0.0)
    (run,) = list_runs(store)
    drawn = smoothed_now([run], ["loss/total"], "step", 0.99)
    assert 900 < len(drawn) < 1100 and drawn["x"].iloc[[0, -1]].tolist() == [1.0, 4000.0]
    assert 0.5 < drawn["value"].iloc[-300:].mean() < 1.5


def test_a_logarithmic_axis_leaves_out_what_has_no_place_there() -> None:
    drawn = curves.chart(frame([0.0, -1.0, 2.0]), "loss/total", {"r": "run"}, by="step", log_x=False, log_y=True)
    assert drawn.data["value"].tolist() == [2.0] and drawn.to_dict()["encoding"]["y"]["scale"]["type"] == "log"


def loads_of(load: list) -> ExpertLoads:
    return ExpertLoads([2, 5], np.array([10, 20, 30]), np.array(load, dtype=np.float16))


def test_dead_experts_are_told_with_the_step_from_which_they_are() -> None:
    loads = loads_of([[[1, 1], [0, 2]], [[2, 0], [1, 1]], [[2, 0], [0, 2]]])
    assert dead_experts(loads) == [
        {"layer": 2, "expert": 1, "without tokens since step": 20},
        {"layer": 5, "expert": 0, "without tokens since step": 30},
    ]
    assert measured(loads, "maximal violation").tolist() == [[0, 1], [1, 0], [1, 1]]
    assert measured(loads, "dead experts").tolist() == [[0, 1], [1, 0], [1, 1]]


def test_a_heatmap_has_every_cell_where_it_belongs() -> None:
    value = np.arange(6.0).reshape(2, 3)
    names = {"across_title": "a", "down_title": "d", "value_title": "v"}
    cells = heatmap(value, [7, 8, 9], [2, 5], **names, balanced=True).data
    assert {(row.down, row.across): row.value for row in cells.itertuples()} == {
        (down, across): value[y, x] for y, down in enumerate([2, 5]) for x, across in enumerate([7, 8, 9])
    }


def test_a_sample_s_channels_are_apart_and_its_text_is_text() -> None:
    page = run_files.sample_html(
        "<|start|>user<|message|>Hi <b>",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4",
    )
    assert "<b>" not in page and page.count("0,150,200") == 1 and page.count("40,160,70") == 1


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "iter_0000005").mkdir(parents=True)
    rows = run_files.checkpoint_rows(tmp_path)
    assert [row["checkpoint"] for row in rows] == ["iter_0000005"] and rows[0]["state"].startswith("damaged: ")
    assert run_files.samples_of(tmp_path) == []
    (tmp_path / "samples.jsonl").write_text('{"step": 5, "prompt": "p", "completion": "c"}\n{"step": 6, "pro')
    assert run_files.samples_of(tmp_path) == [(5, "p", "c")]
    for line in ('{"step": "x", "prompt": "p", "completion": "c"}', '{"completion": "c"}', "5"):
        (tmp_path / "samples.jsonl").write_text(line + "\n")
        with pytest.raises(DataError, match="line 1 is no sample"):
            run_files.samples_of(tmp_path)


def test_every_dataset_of_a_run_is_offered(tmp_path: Path) -> None:
    store, (one, other) = tmp_path / "runs" / "registry.sqlite", (tmp_path / "one", tmp_path / "other")
    for folder in (one, other):
        folder.mkdir()
        (folder / "manifest.json").touch()
    blend = [{"path": str(one), "weight": 1.0}, {"path": str(other), "weight": 2.0}, {"path": "x" * 300}]
    for data in ({"data_path": None, "blend": blend}, {"data_path": str(one), "blend": None}, {"blend": [1, {}]}, {}):
        write_run(store, "a", config=json.dumps({"data": data}))
        (run,) = list_runs(store)
        expected = [one, other] if data.get("blend") == blend else [one] if data.get("data_path") else []
        assert datasets.datasets_in(datasets.trained_on(run)) == expected


def test_a_damaged_report_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text(json.dumps({"kind": "perf", "speed": {"tokens": [1, 2]}}))
    (tmp_path / "c.json").write_text(json.dumps({"no": "kind"}))
    (tmp_path / "d.json").write_text(json.dumps({"kind": "eval_suite", "suite": "x"}))
    record = {"rung": 1, "object": "o", "job": "j", "job_time": {"seconds": 1.0}, "suites": {"core8": {"value": None}}}
    record["evaluation"] = {"texts": {"bits_per_byte": 1.0, "nats_per_token": 2.0}, "questions": {"accuracy": 0.5}}
    for name, steps in (("e", [{**record, "rung": 1}, {"rung": 2}]), ("f", [{**record, "job_time": {"seconds": []}}])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"kind": "ladder", "steps": steps}))
    (tmp_path / "g.json").write_text(json.dumps({"kind": "ladder", "steps": [record]}))
    found = found_reports.find_reports([tmp_path])
    assert [path.name for path, _ in found.others] == ["b.json"] and len(found.refused) == 4
    (whole,) = found.ladders
    assert whole[0].name == "g.json" and whole[1][0]["exact, %"] == 50.0 and whole[1][0]["core8"] is None
    assert found_reports.field_rows(found.others[0][1])[1] == {"field": "speed.tokens[0]", "value": "1"}


def test_places_go_through_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for places in (Places(), Places(Path("a b"), (Path("m"),), (Path("d"), Path("ü")), (Path("r"),))):
        monkeypatch.setattr("sys.argv", ["script", places.argument()])
        assert Places.given() == places


def test_a_missing_streamlit_is_told_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["app", "--port", "0"]) == 2
    assert "pip install 'vpmoe[app]'" in capsys.readouterr().err


def test_a_busy_port_and_an_address_of_nobody_are_told() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BusyError, match="cannot be used: Address already in use"):
            free_port("127.0.0.1", taken.getsockname()[1])
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(ConfigError, match="no address"):
        free_port("nobody.invalid", 0)
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("::")
