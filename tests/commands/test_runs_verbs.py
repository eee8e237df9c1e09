"""``vpmoe runs`` as a user gives it, on runs that trained: killed, resumed, many at once."""

from __future__ import annotations

import io
import json
import os
import signal
import warnings
from pathlib import Path

import pytest
from PIL import Image

from megatron_vpmoe.metrics.run_store import VARIABLE, identity_of
from tests import training_runs
from tests.fixtures_dataset import small_dataset
from tests.unit.vpmoe.runs.written_runs import register_runs, write_run
from tests.workers import Started
from vpmoe.cli import main
from vpmoe.errors import DataError, NotOursError
from vpmoe.runs.panels import of_tags
from vpmoe.runs.plots import plot
from vpmoe.runs.queries import last_values, series
from vpmoe.runs.registry import find_run, list_runs


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, path := str(tmp_path / "runs" / "registry.sqlite"))
    monkeypatch.setitem(training_runs.ENVIRONMENT, VARIABLE, path)
    return Path(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "small")


def test_a_picture_replaces_only_pictures_of_ours(store: Path, tmp_path: Path) -> None:
    write_run(store, "a")
    write_run(store, "b", started=0.0)
    output = tmp_path / "runs.png"
    for smoothing in (0.0, 0.9):
        plot(list_runs(store), of_tags(["loss/total", "lr"]), output, by="tokens", smoothing=smoothing, log_y=True)
        assert Image.open(output).size[0] > 1000
    output.write_bytes(b"mine")
    with pytest.raises(NotOursError):
        plot(list_runs(store), of_tags(["lr"]), output)
    assert output.read_bytes() == b"mine"


def test_names_in_a_picture_are_no_formulas(store: Path, tmp_path: Path) -> None:
    directory = write_run(store, "_$\\frac{$")
    with (directory / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 1, "tag": "$\\frac{$", "value": 1.0}) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(list_runs(store), of_tags(["lr", "$\\frac{$"]), tmp_path / "runs.png")
    assert Image.open(tmp_path / "runs.png").size[0] > 1000


def test_a_picture_of_nothing_is_refused(store: Path, tmp_path: Path) -> None:
    write_run(store, "a", tokens_per_step=None)
    with pytest.raises(DataError, match="over tokens"):
        plot(list_runs(store), of_tags(["lr"]), tmp_path / "x.png", by="tokens")


def test_the_verbs(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPMOE_RUN_STORE", str(store))
    assert main(["runs", "list"]) == 0 and "no such run" in capsys.readouterr().err
    write_run(store, "a", note="\x1b[31mred [bold]", steps=30)
    write_run(store, "b", started=0.0, changes={"lr": 0.02})

    def told(*words: str) -> str:
        assert main(["runs", *words]) == 0
        return capsys.readouterr().out

    assert told("list", "--sort", "loss/total").index(" b ") < told("list").index(" b ")
    assert [run["name"] for run in json.loads(told("list", "--json", "--limit", "1"))] == ["a"]
    assert json.loads(told("list", "--json", "--status", "failed")) == []
    shown = told("show", "a", "--config")
    assert "\\x1b[31mred [bold]" in shown and "num_layers: 4" in shown and "▁" in shown
    assert json.loads(told("show", "a", "--json"))["metrics"]["lr"] == 0.01
    assert "optim.lr" in told("compare", "a", "b", "--by", "time")
    assert json.loads(told("compare", "a", "b", "--json"))["config"]["optim.lr"] == [0.01, 0.02]
    assert "2 runs" in told("plot", "a", "b", "--output", str(tmp_path / "p.png"), "--tags", "l*")
    assert "120 records" in told("export", "a", "--output", str(tmp_path / "p.csv"))
    assert json.loads(told("sql", "SELECT count(*) AS n FROM runs", "--json")) == [{"n": 2}]
    told("tag", "a", "good")
    assert json.loads(told("list", "--tag", "good", "--json"))[0]["tags"] == ["good"]
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert main(["runs", "rm", "a"]) == 1 and len(list_runs(store)) == 2, "nobody has said yes"
    capsys.readouterr()
    assert "the entry of a" in told("rm", "a", "--yes") and (store.parent / "a").exists()
    assert "MiB" in told("rm", "b", "--yes", "--files") and not (store.parent / "b").exists()
    assert list_runs(store) == []
    hostile = write_run(store, "c")
    config = (hostile / "config.yaml").read_text().replace("run_name: c", 'run_name: "\\e[31mc"')
    (hostile / "config.yaml").write_text(config)
    told("rm", "c", "--yes")
    assert "\\x1b[31mc: " in told("add", str(hostile))
    assert "\\x1b[31mc (" in told("rm", str(hostile), "--yes"), "what is asked about is told as it is written"
    for words in (["show", "a"], ["compare", "a"], ["sql", "DROP TABLE runs"]):
        assert main(["runs", *words]) == 2
        assert "Error" in capsys.readouterr().err


def test_a_run_is_seen_while_it_trains_killed_and_resumed(store: Path, tmp_path: Path, dataset: Path) -> None:
    """Its metrics are read while it writes them; killed it reads as killed at once; tokens and time count on."""
    cfg = {"run_name": "a", "train_iters": 12, "save_interval": 5, "eval_interval": 5, "lr_warmup_iters": 1}
    cfg |= {"async_save": False}  # at step 7 what step 5 saves stands
    directory = tmp_path / "runs" / "a"
    run = training_runs.start(directory, dataset, run_store=store, experiment="killing", **cfg)
    training_runs.reach(2, directory, run.process.is_alive)
    at_work = find_run("a")
    assert (at_work.status, at_work.experiment, at_work.pid) == ("running", "killing", run.process.pid)
    assert last_values(at_work)["elapsed/tokens"] > 0
    assert main(["runs", "rm", "a", "--yes"]) == 2, "not while it runs"
    training_runs.reach(7, directory, run.process.is_alive)
    os.kill(run.process.pid or 0, signal.SIGKILL)
    run.finish(timeout=60)
    killed = find_run("a")
    assert killed.status == "killed" and killed.id == at_work.id == identity_of(directory)
    seen = series([killed], ["elapsed/tokens"])
    assert len(seen) >= 7

    done = training_runs.train(directory, dataset, run_store=store, resume=True, **cfg)
    assert done.returncode == 0
    resumed = find_run("a")
    assert (resumed.id, resumed.status, resumed.step) == (killed.id, "finished", 12)
    assert [(each["status"], each["first_step"]) for each in resumed.segments] == [
        ("killed", 0),
        ("finished", resumed.segments[1]["first_step"]),
    ]
    assert resumed.segments[1]["first_step"] in (5, 10)
    curves = series([resumed], ["tokens/real", "elapsed/tokens", "elapsed/seconds"])
    by_tag = {tag: list(curve["value"]) for tag, curve in curves.groupby("tag")}
    assert by_tag["elapsed/tokens"] == [sum(by_tag["tokens/real"][: step + 1]) for step in range(12)]
    assert by_tag["elapsed/seconds"] == sorted(by_tag["elapsed/seconds"])
    assert resumed.results["valid/loss/total"] == last_values(resumed)["valid/loss/total"]
    assert (
        resumed.provenance["git"] and resumed.provenance["hardware"] and resumed.config["training"]["train_iters"] == 12
    )


def test_what_is_no_store_ends_a_run_before_it_trains(store: Path, tmp_path: Path, dataset: Path) -> None:
    store.parent.mkdir()
    store.write_text("my own notes\n" * 100)
    done = training_runs.train(tmp_path / "run", dataset, run_store=store, train_iters=2, lr_warmup_iters=1)
    assert done.returncode == 2 and "NotOursError" in done.stderr + done.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and store.read_text().startswith("my own notes")


def test_many_runs_register_at_once(store: Path, tmp_path: Path, repository: Path) -> None:
    """Eight processes make the store together and keep five runs each, while readers list them."""
    config, processes, runs = repository / "configs" / "nano" / "stage1.yaml", 8, 5
    started = [Started(register_runs, config, tmp_path, runs, number, environment={}) for number in range(processes)]
    while any(each.process.is_alive() for each in started):
        assert all(run.status in ("running", "finished", "killed") for run in list_runs())
    told = [each.finish() for each in started]
    assert [(end.returncode, end.stderr) for end in told] == [(0, "")] * processes
    found = list_runs()
    assert len(found) == len({run.id for run in found}) == processes * runs
    assert {(run.status, run.step, run.results["loss/total"]) for run in found} == {("finished", 3, 3.0)}
    assert [path.name for path in store.parent.iterdir()] == [store.name], "no journal is left"
