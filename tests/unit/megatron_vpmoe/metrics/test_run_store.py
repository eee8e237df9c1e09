"""The run store: runs stand in it by the identity in their directory, and nothing that befalls it stops a run."""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.errors import DataError, NotOursError
from megatron_vpmoe.metrics import MetricStream, Record, RunStoreSink, registration, run_store
from megatron_vpmoe.metrics.run_store import (
    check_store,
    conclusion_of,
    identity_of,
    opened_store,
    read_store,
    store_path,
)
from tests.tiny import tiny_config
from vpmoe.runs.queries import tags_of
from vpmoe.runs.registry import list_runs

LAST = 4


@pytest.fixture(scope="module")
def configuration() -> RunConfig:
    return tiny_config(run_name="a", train_iters=LAST, lr_warmup_iters=1)


class Place:
    """A store and the directory of a run beside it."""

    def __init__(self, folder: Path, configuration: RunConfig) -> None:
        self.store, self.run = folder / "runs" / "registry.sqlite", folder / "runs" / "a"
        self.run.mkdir(parents=True)
        self._configuration = configuration
        self.reports: list[str] = []

    def sink(self, *, directory: Path | None = None, step: int = 0, kept: Sequence[Record] = ()) -> RunStoreSink:
        logging = self._configuration.logging.model_copy(update={"run_store": str(self.store)})
        cfg = self._configuration.model_copy(update={"logging": logging})
        facts: dict[str, Any] = {"provenance": {"config_hash": "h"}, "step": step, "kept": kept, "world_size": 1}
        return RunStoreSink(cfg, directory or self.run, **facts, report=self.reports.append)

    def rows(self, table: str = "runs") -> list[dict[str, Any]]:
        with read_store(self.store) as connection:
            assert connection is not None
            return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY started")]


@pytest.fixture
def place(tmp_path: Path, configuration: RunConfig) -> Place:
    return Place(tmp_path, configuration)


def steps(first: int, last: int) -> list[Record]:
    return [Record(step, "loss/total", 1 / step) for step in range(first, last + 1)]


def test_a_run_that_fails_of_a_text_without_utf_8_concludes(place: Place) -> None:
    place.sink().close("ValueError: \ud800 and \x1b[31m")
    (row,) = place.rows()
    assert (row["status"], row["error"]) == ("failed", "ValueError: \\ud800 and \\x1b[31m") and place.reports == []


@pytest.mark.parametrize(
    ("last", "failure", "status"), [(LAST, None, "finished"), (2, None, "stopped"), (2, "DataError: gone", "failed")]
)
def test_a_run_concludes(place: Place, last: int, failure: str | None, status: str) -> None:
    sink = place.sink()
    (row,) = place.rows()
    assert (row["id"], row["status"], row["pid"], row["ended"]) == (
        identity_of(place.run),
        "running",
        os.getpid(),
        None,
    )
    sink.write(steps(1, last))
    sink.close(failure)
    (row,) = place.rows()
    assert (row["status"], row["error"], row["step"]) == (status, failure, last)
    assert row["ended"] >= row["started"] and f'"loss/total": {1 / last}' in row["results"]
    assert place.reports == []


def test_results_are_there_from_a_checkpoint_on(place: Place) -> None:
    sink = place.sink()
    sink.write(steps(1, 2))
    sink.sync()
    deadline = time.monotonic() + 20
    while place.rows()[0]["step"] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert place.rows()[0]["status"] == "running"
    sink.close()


def test_a_resumed_run_is_one_run(place: Place) -> None:
    """Killed after step 3, it goes on from step 2: one row, two segments, results as of its last step."""
    first = place.sink()
    with opened_store(place.store) as connection:
        connection.execute("UPDATE runs SET note = 'mine'")
    again = place.sink(step=2, kept=[*steps(1, 2), Record(2, "valid/loss/total", 0.7)])
    again.write(steps(3, LAST))
    again.close()
    (row,) = place.rows()
    assert row["status"] == "finished" and row["note"] == "mine"
    assert '"valid/loss/total": 0.7' in row["results"], "of the steps that were kept"
    segments = [(each["number"], each["status"], each["first_step"]) for each in place.rows("segments")]
    assert segments == [(0, "killed", 0), (1, "finished", 2)]
    first._queue.put(None)


def test_a_moved_run_keeps_its_row_and_a_copied_one_gets_its_own(place: Place) -> None:
    place.sink().close()
    (row,) = place.rows()
    moved = place.run.rename(place.run.with_name("moved"))
    place.sink(directory=moved).close()
    assert [(each["id"], each["directory"]) for each in place.rows()] == [(row["id"], "moved")]
    copy = Path(shutil.copytree(moved, moved.with_name("copy")))
    place.sink(directory=copy).close()
    assert {each["directory"] for each in place.rows()} == {"moved", "copy"}
    assert identity_of(moved) == row["id"] != identity_of(copy)


def test_store_and_runs_move_together(place: Place) -> None:
    place.sink().close()
    place.store.parent.rename(elsewhere := place.store.parent.with_name("elsewhere"))
    place.store = elsewhere / place.store.name
    (row,) = place.rows()
    assert run_store.found_directory(place.store, row["directory"], row["id"]) == elsewhere / "a"


def test_a_step_that_finishes_takes_its_run_along(place: Place, tmp_path: Path) -> None:
    partial = tmp_path / "object.partial" / "training"
    partial.mkdir(parents=True)
    place.sink().close()
    shutil.copyfile(place.run / run_store.IDENTITY, partial / run_store.IDENTITY)
    run_store.moved(place.store, partial)
    partial.parent.rename(tmp_path / "object")
    (row,) = place.rows()
    assert run_store.found_directory(place.store, row["directory"], row["id"]) == tmp_path / "object" / "training"


def foreign_text(path: Path) -> None:
    path.write_text("my own notes, which are longer than the header of a database\n" * 20)


def foreign_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()


def later_version(path: Path) -> None:
    with opened_store(path) as connection:
        connection.execute("PRAGMA user_version = 99")


def damaged(path: Path) -> None:
    with opened_store(path):
        pass
    content = bytearray(path.read_bytes())
    content[100:4096] = b"\xff" * 3996  # the first page's tree: the schema
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (foreign_text, NotOursError),
        (foreign_database, NotOursError),
        (later_version, DataError),
        (damaged, DataError),
        (Path.mkdir, DataError),
    ],
)
def test_what_is_no_store_is_refused_and_stays(place: Place, make: Any, error: type[Exception]) -> None:
    make(place.store)
    before = place.store.read_bytes() if place.store.is_file() else None
    for attempt in (
        lambda: check_store(place.store, place.run),
        place.sink,
        lambda: read_store(place.store).__enter__(),
    ):
        with pytest.raises(error, match="registry"):
            attempt()
    assert before is None or place.store.read_bytes() == before


def test_a_place_that_takes_no_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be registered"):
        check_store(tmp_path / "file" / "registry.sqlite", tmp_path)
    check_store(tmp_path / "new" / "registry.sqlite", tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_directory_whose_name_is_not_utf_8_is_refused_before_the_run(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"of bytes \xff")
    inside, place.store = folder / "runs" / "a", tmp_path / "registry.sqlite"
    inside.mkdir(parents=True)
    for attempt in (lambda: check_store(place.store, inside), lambda: place.sink(directory=inside)):
        with pytest.raises(DataError, match=r"not UTF-8: .*bytes \\udcff/runs/a"):
            attempt()
    assert not place.store.exists() and identity_of(inside) is None
    place.store = folder / "registry.sqlite"  # beside it, the run has a name
    check_store(place.store, inside)
    place.sink(directory=inside).close()
    assert [row["directory"] for row in place.rows()] == ["runs/a"] and place.reports == []
    assert run_store.experiment_of(None, folder / "a") == "of bytes \\udcff"
    with pytest.raises(DataError, match="DuckDB opens no such"):
        tags_of(list_runs(place.store))


def test_an_empty_file_becomes_a_store(place: Place) -> None:
    place.store.touch()
    place.sink().close()
    assert len(place.rows()) == 1


def test_a_store_that_is_locked_is_told_once_and_holds_nothing_up(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "_PATIENCE_SECONDS", 0.05)
    sink = place.sink()
    other = sqlite3.connect(place.store, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    for step in range(1, LAST):
        sink.write(steps(step, step))
        sink.sync()
    assert time.monotonic() - began < 1, "training waits for no store"
    deadline = time.monotonic() + 20
    while not place.reports:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    other.close()
    sink.write(steps(LAST, LAST))
    sink.close()
    assert len(place.reports) == 1 and "another process" in place.reports[0]
    assert place.rows()[0]["status"] == "finished", "it is up to date again"


def test_a_store_that_never_answers_delays_the_end_by_its_patience(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "_PATIENCE_SECONDS", 0.1)
    sink = place.sink()
    monkeypatch.setattr(sink, "_put", lambda _rows: time.sleep(3))
    began = time.monotonic()
    sink.close()
    assert time.monotonic() - began < 2
    assert len(place.reports) == 1 and "has not answered" in place.reports[0]


def test_an_end_that_the_store_does_not_take_stands_in_the_directory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the run goes on: what killed it is not read as how it ended before."""
    monkeypatch.setattr(run_store, "_PATIENCE_SECONDS", 0.05)
    sink = place.sink()
    sink.write(steps(1, 2))
    other = sqlite3.connect(place.store, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    sink.close("SpikeError: gone")
    other.close()
    assert len(place.reports) == 1 and [row["status"] for row in place.rows()] == ["running"]
    told = conclusion_of(place.run)
    assert told is not None and (told["status"], told["error"], told["step"]) == ("failed", "SpikeError: gone", 2)
    (run,) = list_runs(place.store)
    assert (run.status, run.error, run.step, run.results) == ("failed", "SpikeError: gone", 2, {"loss/total": 0.5})
    assert run.ended is not None and run.ended >= run.started

    again = place.sink(step=2)
    assert conclusion_of(place.run) is None and [row["status"] for row in place.rows()] == ["running"]
    assert [each["status"] for each in place.rows("segments")] == ["failed", "running"]
    again.write(steps(3, LAST))
    again.close()
    assert conclusion_of(place.run) is None and list_runs(place.store)[0].status == "finished"


def test_a_store_that_vanishes_is_made_again(place: Place) -> None:
    sink = place.sink()
    place.store.unlink()
    sink.write(steps(1, LAST))
    sink.close()
    assert place.reports == [] and place.rows()[0]["status"] == "finished"


def test_numbers_that_are_none_are_kept_as_json(place: Place) -> None:
    sink = place.sink()
    sink.write([Record(1, "loss/total", math.nan), Record(1, "valid/loss/total", math.inf)])
    sink.close()
    (row,) = place.rows()
    assert '"loss/total": "nan"' in row["results"] and '"valid/loss/total": "inf"' in row["results"]


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_path("mine.sqlite") == Path("mine.sqlite")
    monkeypatch.setenv("VPMOE_RUN_STORE", "/of/the/environment")
    assert store_path() == Path("/of/the/environment")
    monkeypatch.delenv("VPMOE_RUN_STORE")
    assert store_path() == Path("runs/registry.sqlite")


class Sunk:
    def __init__(self, fails: bool = False) -> None:
        self.records: list[Record] = []
        self.failure: str | None = "not closed"
        self._fails = fails

    def write(self, records: Any) -> None:
        self.records += records

    def sync(self) -> None: ...

    def close(self, failure: str | None = None) -> None:
        self.failure = failure
        if self._fails:
            raise OSError("full")


def test_a_stream_tells_every_sink_how_the_run_ended() -> None:
    sinks = [Sunk(fails=True), Sunk()]
    with pytest.raises(OSError, match="full"), MetricStream(sinks):
        raise DataError("gone")
    assert [sink.failure for sink in sinks] == ["DataError: gone"] * 2


def test_where_a_step_lies_is_recorded_once() -> None:
    sink, tokens = Sunk(), iter([100.0, 200.0])
    with MetricStream([sink], place=lambda: {"elapsed/tokens": next(tokens)}) as stream:
        stream.log(1, {"loss/total": 2.0})
        stream.log(1, {"valid/loss/total": 3.0})
        stream.log(2, {"loss/total": 1.0})
    assert [record for record in sink.records if record.tag == "elapsed/tokens"] == [
        (1, "elapsed/tokens", 100.0),
        (2, "elapsed/tokens", 200.0),
    ]
