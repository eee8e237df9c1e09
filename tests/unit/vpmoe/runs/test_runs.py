"""Runs found, asked, compared, exported and removed, over metrics that a run has left."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from megatron_vpmoe.metrics import read_records
from megatron_vpmoe.metrics.run_store import _CONCLUDES, opened_store
from megatron_vpmoe.ownership import owned
from tests.unit.vpmoe.runs.written_runs import write_run
from vpmoe import steps
from vpmoe.errors import BusyError, DataError, NotOursError
from vpmoe.runs import editing, removal
from vpmoe.runs.comparison import config_differences, origin_differences, overlay
from vpmoe.runs.database import ask, connect, damaged_lines
from vpmoe.runs.export import export
from vpmoe.runs.queries import last_values, matching, series, smoothed, tags_of
from vpmoe.runs.registry import RunEntry, checkpoints_of, find_run, list_runs
from vpmoe.runs.tables import console, show_list, sparkline


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "registry.sqlite"


def only(store: Path) -> RunEntry:
    (run,) = list_runs(store)
    return run


def test_runs_are_listed_newest_first_with_what_they_are(store: Path) -> None:
    assert list_runs(store) == []
    write_run(store, "old", started=1.0)
    write_run(store, "new", started=2.0, steps=3, status="failed", error="DataError: gone")
    new, old = list_runs(store)
    assert (new.name, new.status, new.error, old.name, old.status) == (
        "new",
        "failed",
        "DataError: gone",
        "old",
        "finished",
    )
    assert new.results == {"loss/total": 1 / 3} and new.config["training"]["run_name"] == "new"
    assert new.directory == store.parent / "new" and new.is_there


def test_who_holds_the_directory_tells_whether_a_run_is_running(store: Path) -> None:
    directory = write_run(store, "a", status="running")
    assert only(store).status == "killed"
    with owned(directory / ".lock", "the run"):
        assert only(store).status == "running"
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # another process, which ends without a word
        with (directory / ".lock").open("r+b") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX)
            os.write(writing, b"locked")
            time.sleep(60)
            os._exit(1)
    os.read(reading, 6)
    assert only(store).status == "running"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert only(store).status == "killed"


def test_a_directory_that_is_not_seen(store: Path) -> None:
    shutil.rmtree(write_run(store, "a", status="running"))
    assert only(store).status == "unknown", "it runs on a host that is not this one"
    with opened_store(store) as connection:
        connection.execute("UPDATE runs SET host = ?, pid = ?", (socket.gethostname(), 2**22 + 1))
    assert only(store).status == "killed"
    with opened_store(store) as connection:
        connection.execute("UPDATE runs SET pid = ?, started = 1e11", (os.getpid(),))
    assert only(store).status == "running"


def test_a_directory_that_cannot_be_looked_at_hides_no_other(store: Path) -> None:
    """A folder of others, or on a file system that is away; here its name is longer than there are any."""
    write_run(store, "whole")
    write_run(store, "away", started=0.0, status="running", directory="x" * 300)
    whole, away = list_runs(store)
    assert (whole.status, away.status, away.is_there) == ("finished", "unknown", False)
    assert ask("SELECT DISTINCT name FROM metrics JOIN runs USING (run)", store)[1] == [("whole",)]
    assert checkpoints_of(away.directory) == []


def test_a_run_is_found_by_what_a_person_calls_it(store: Path) -> None:
    directory = write_run(store, "a", started=1.0)
    write_run(store, "b", started=2.0)
    with opened_store(store) as connection:
        connection.execute("UPDATE runs SET id = 'abcd01234567' WHERE name = 'a'")
        connection.execute("UPDATE runs SET id = 'abce01234567', name = 'a' WHERE name = 'b'")
    (directory / "run.json").write_text('{"id": "abcd01234567"}')
    assert find_run("abcd", store).started == 1.0
    assert find_run("a", store).started == 2.0, "the newest of the name"
    assert find_run(str(directory), store).started == 1.0
    directory.rename(moved := directory.with_name("moved"))
    assert find_run(str(moved), store).directory == moved
    with pytest.raises(DataError, match=r"abce01234567.*abcd01234567"):
        find_run("abc", store)
    for text in ("", "zzz"):
        with pytest.raises(DataError, match="no run is called"):
            find_run(text, store)


def test_metrics_are_read_to_the_last_digit(store: Path) -> None:
    """Every value as Python reads it, numbers that are none included; not what a kill has cut, nor damaged lines."""
    directory = write_run(
        store, "a", steps=50, loss=lambda step: (math.nan, math.inf, -math.inf, 0.1 + 0.2, 1 / 3)[step % 5]
    )
    with (directory / "metrics.jsonl").open("a") as stream:
        stream.write('no record\n{"step": 51, "tag": "loss/total", "val')
    run = only(store)
    with connect(store) as database:
        found = database.execute("SELECT step, tag, value FROM metrics ORDER BY step, tag").fetchall()
    lines = (directory / "metrics.jsonl").read_text().splitlines()[:-2]
    expected = sorted((each["step"], each["tag"], float(each["value"])) for each in map(json.loads, lines))
    assert [repr(row) for row in found] == [repr(row) for row in expected]
    assert damaged_lines(run) == 1
    assert tags_of([run]) == ["elapsed/seconds", "elapsed/tokens", "loss/total", "lr"]
    assert math.isnan(last_values(run)["loss/total"])


def test_a_file_that_grows_is_read_as_it_is(store: Path) -> None:
    directory = write_run(store, "a", steps=2)
    with connect(store) as database:
        count = "SELECT count(*) FROM metrics"
        before = database.execute(count).fetchall()[0][0]
        with (directory / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 3, "tag": "loss/total", "value": 1}\n')
        assert database.execute(count).fetchall()[0][0] == before + 1


@pytest.mark.parametrize("points", [2, 7, 100])
def test_a_thinned_curve_keeps_its_extremes_and_ends(store: Path, points: int) -> None:
    spikes = {137: 50.0, 500: -7.0, 731: math.nan}
    write_run(store, "a", steps=1000, loss=lambda step: spikes.get(step, math.sin(step)))
    curve = series([only(store)], ["loss/total"], points=points)
    kept = dict(zip(curve["x"], curve["value"], strict=True))
    assert len(curve) <= 2 * points + 3
    assert kept[137] == 50.0 and kept[500] == -7.0 and math.isnan(kept[731])
    assert {1.0, 1000.0} <= kept.keys() and list(curve["x"]) == sorted(curve["x"])
    assert all(math.isnan(value) or value == spikes.get(step, math.sin(step)) for step, value in kept.items())


def test_a_short_curve_is_whole(store: Path) -> None:
    write_run(store, "a", steps=40)
    curve = series([only(store)], ["loss/total", "lr"], points=40)
    assert list(curve[curve["tag"] == "loss/total"]["value"]) == [1 / step for step in range(1, 41)]
    assert len(curve) == 80


def test_curves_lie_over_steps_tokens_and_time(store: Path) -> None:
    write_run(store, "a", steps=4, tokens_per_step=7)
    write_run(store, "older", steps=4, tokens_per_step=None, started=0.0)
    runs = list_runs(store)
    for by, expected in (("step", [1, 2, 3, 4]), ("tokens", [7, 14, 21, 28]), ("time", [0.5, 1, 1.5, 2])):
        curves = series(runs, ["loss/total"], by=by)
        assert list(curves[curves["run"] == runs[0].id]["x"]) == expected
        assert (runs[1].id in set(curves["run"])) == (by == "step"), "what records no place has none"
    with pytest.raises(DataError, match="no axis 'epochs'"):
        series(runs, ["loss/total"], by="epochs")


def test_smoothing_is_the_unbiased_mean(store: Path) -> None:
    write_run(store, "a", steps=20, loss=float)
    curve = series([only(store)], ["loss/total"])
    mean, weight, expected = 0.0, 0.0, []
    for value in range(1, 21):
        mean, weight = 0.9 * mean + 0.1 * value, 0.9 * weight + 0.1
        expected.append(mean / weight)
    assert list(smoothed(curve, 0.9)["value"]) == pytest.approx(expected)


def test_runs_are_compared_at_points_that_all_have_reached(store: Path) -> None:
    write_run(store, "a", steps=100, tokens_per_step=10)
    write_run(store, "b", steps=50, tokens_per_step=15, loss=lambda step: 2 / step, changes={"lr": 0.02}, started=0.0)
    a, b = list_runs(store)
    frame = overlay([a, b], ["loss/total"], by="tokens", points=3)
    found = {(x, run): value for _, x, run, value in frame.itertuples(index=False)}
    assert sorted({x for x, _ in found}) == [15.0, 382.5, 750.0]
    for x in (15.0, 382.5, 750.0):
        assert found[x, a.id] == 1 / (x // 10) and found[x, b.id] == 2 / (x // 15)
    assert config_differences([a, b]) == [("optim.lr", [0.01, 0.02]), ("training.run_name", ["a", "b"])]
    assert origin_differences([a, b]) == [("git.sha", ["of a", "of b"])]
    assert config_differences([a, a]) == []


WRITING = (
    "COPY runs TO '{}'",
    "COPY (SELECT 1) TO '{}' (USE_TMP_FILE false)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{}'",
    "SELECT 1; COPY runs TO '{}'",
    "ATTACH '{}' AS other",
    "EXPORT DATABASE '{}'",
    "SELECT * FROM enable_logging(storage = 'file', storage_path = '{}')",
    "SELECT * FROM query('COPY runs TO ''{}''')",
    "INSERT INTO runs (run) VALUES ('{}')",
    "SET log_query_path = '{}'",
    "",
    "not sql {}",
)


@pytest.mark.parametrize("sql", WRITING)
def test_sql_writes_nothing(store: Path, tmp_path: Path, sql: str) -> None:
    directory = write_run(store, "a", steps=2)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target in (tmp_path / "new", directory / "metrics.jsonl", store):
        with pytest.raises(DataError):
            ask(sql.format(target), store)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written


def test_sql_reads_no_other_file(store: Path, tmp_path: Path) -> None:
    write_run(store, "a")
    (secret := tmp_path / "secret").write_text("x")
    for sql in (f"SELECT * FROM read_text('{secret}')", f"FROM '{secret}'", f"SELECT * FROM glob('{tmp_path}/*')"):
        with pytest.raises(DataError):
            ask(sql, store)


def test_sql_joins_runs_and_metrics(store: Path) -> None:
    write_run(store, "a", steps=3)
    columns, rows = ask(
        "SELECT name, step, value, tokens FROM metrics JOIN runs USING (run) WHERE tag = 'lr' ORDER BY step", store
    )
    assert columns == ["name", "step", "value", "tokens"]
    assert rows == [("a", step, 0.01, 10.0 * step) for step in (1, 2, 3)]
    assert ask("SELECT results['loss/total'], config->>'$.optim.lr' FROM runs", store)[1] == [(1 / 3, "0.01")]
    assert ask("DESCRIBE metrics", store)[1][0][:2] == ("run", "VARCHAR")


@pytest.mark.parametrize("name", ["value=3", "step=7", "a*b", "a[X]b", "a?b", "it's"])
def test_a_directory_of_any_name_is_that_directory(store: Path, name: str) -> None:
    """DuckDB reads a path with "=" as a partition, and one with signs of a pattern as a pattern."""
    write_run(store, name, steps=3)
    write_run(store, "aXb", steps=2, started=0.0)
    expected = {name: [1.0, 2.0, 3.0], "aXb": [1.0, 2.0]}
    for run in list_runs(store):
        assert list(series([run], ["loss/total"])["value"]) == [1 / step for step in expected[run.name]]
    asked = ask("SELECT name, step FROM metrics JOIN runs USING (run) WHERE tag = 'lr' ORDER BY ALL", store)[1]
    assert asked == sorted((each, step) for each, steps in expected.items() for step in steps)


@pytest.mark.parametrize("column", ["config", "provenance", "results"])
@pytest.mark.parametrize("text", ["[]", '{"git": [1]}', f'{{"git": 1{"0" * 400}}}', "[" * 100_000])
def test_a_damaged_row_hides_no_other_and_can_be_removed(store: Path, column: str, text: str) -> None:
    write_run(store, "whole")
    write_run(store, "broken", started=0.0)
    with opened_store(store) as connection:
        connection.execute(f"UPDATE runs SET {column} = ? WHERE name = 'broken'", (text,))
    whole, broken = list_runs(store)
    assert whole.error is None and ask("SELECT git FROM runs WHERE name = 'whole'", store)[1] == [("of whole",)]
    assert broken.error == f"its {column} in the run store is damaged" and getattr(broken, column) == {}
    editing.forget(find_run("broken", store), store)
    assert [run.name for run in list_runs(store)] == ["whole"]


def test_a_damaged_column_of_any_kind_hides_no_other(store: Path) -> None:
    columns = ("name", "experiment", "directory", "status", "error", "note", "host", "started", "ended", "step", "pid")
    values = (b"\xff", "soon", -(2**60), 1.5e300)
    write_run(store, "whole")
    concluded = write_run(store, "concluded") / "run.json"
    concluded.write_text(
        json.dumps({**json.loads(concluded.read_text()), "concluded": {name: [1] for name in _CONCLUDES}})
    )
    for column in columns:
        for number, _ in enumerate(values):
            write_run(store, f"{column} {number}", steps=1)
    with opened_store(store) as connection:
        for column in columns:
            for number, value in enumerate(values):
                connection.execute(f"UPDATE runs SET {column} = ? WHERE name = ?", (value, f"{column} {number}"))
    runs = {run.name: run for run in list_runs(store)}
    assert runs["whole"].error is None and runs["concluded"].error is not None
    show_list([*runs.values()], console())
    assert len(ask("SELECT started, ended, last_step FROM runs", store)[1]) == 2 + len(columns) * len(values)


def test_sql_without_any_run(store: Path) -> None:
    assert ask("SELECT * FROM runs", store)[1] == ask("SELECT * FROM metrics", store)[1] == []


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_an_export_holds_every_record(store: Path, tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        write_run(store, name, steps=5, loss=lambda step: math.inf if step == 3 else 1 / step)
    runs, output = list_runs(store), tmp_path / f"out{suffix}"
    assert export(runs, output, ["loss/total"]) == 10
    if suffix == ".csv":
        with output.open() as stream:
            rows: list[Any] = list(csv.DictReader(stream))
    else:
        rows = (
            parquet.read_table(output).to_pylist()
            if suffix == ".parquet"
            else [
                json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
                for line in output.read_text().splitlines()
            ]
        )
    found = [(row["name"], int(row["step"]), float(row["value"]), float(row["tokens"])) for row in rows]
    values = [1.0, 1 / 2, math.inf, 1 / 4, 1 / 5]
    assert found == [(name, step, values[step - 1], 10.0 * step) for name in "ab" for step in range(1, 6)]
    with pytest.raises(NotOursError, match="already"):
        export(runs, output)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [output.name]


def test_an_unknown_format_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no format"):
        export([], tmp_path / "out.xlsx")


def test_globs_name_what_they_miss() -> None:
    assert matching(["loss/*", "lr"], ["loss/a", "loss/b", "lr"]) == ["loss/a", "loss/b", "lr"]
    with pytest.raises(DataError, match="loss/total"):
        matching(["loss/totl"], ["loss/total", "lr"])


def test_tags_and_notes(store: Path) -> None:
    write_run(store, "a")
    editing.tag(only(store), ["good", "long"], store)
    editing.tag(only(store), ["good"], store)
    editing.untag(only(store), ["long"], store)
    editing.note(only(store), "  with a twist ", store)
    assert (only(store).tags, only(store).note) == (("good",), "with a twist")
    for tag in ("", "two words", "a,b", "\x1b[31m"):
        with pytest.raises(DataError, match="is no tag"):
            editing.tag(only(store), [tag], store)
    with pytest.raises(DataError, match="has no tag"):
        editing.untag(only(store), ["bad"], store)


def test_a_run_from_elsewhere_is_added_once(store: Path, tmp_path: Path) -> None:
    directory = write_run(other := tmp_path / "other" / "registry.sqlite", "a", steps=100)
    kept = find_run("a", other).id
    run = editing.add(directory, store)
    assert (run.id, run.name, run.status, run.step, run.results["loss/total"]) == (kept, "a", "finished", 100, 0.01)
    with pytest.raises(DataError, match="knows this run"):
        editing.add(directory, store)
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    assert editing.add(copy, store).id != kept
    directory.rename(tmp_path / "moved")
    assert editing.add(tmp_path / "moved", store).id == kept and len(list_runs(store)) == 2


def test_a_run_whose_checkpoint_is_damaged_is_added(store: Path, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "other" / "registry.sqlite", "a")
    (directory / "checkpoints" / "iter_0000100").mkdir(parents=True)
    for state in ("{", '{"provenance": {"git": "x"}, "world_size": "y"}'):
        (directory / "checkpoints" / "iter_0000100" / "run_state.json").write_text(state)
        assert editing.add(directory, store).provenance == {}
        assert ask("SELECT git FROM runs", store)[1] == [(None,)]
        editing.forget(only(store), store)


_SECTION = "training: {run_name: a, train_iters: 3}\nlogging: "


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "training: 3", "training: {run_name: a}", "a: [", "\0"),
        *(f"{_SECTION}{{project: {value}}}" for value in ("2020-01-01", ".nan", '"\\ud800"')),
    ],
)
def test_what_is_no_run_is_not_added(store: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DataError, match=r"config\.yaml"):
        editing.add(tmp_path, store)
    assert list_runs(store) == []


def test_files_go_only_if_runs_wrote_them_all(store: Path) -> None:
    directory = write_run(store, "a")
    for foreign in ("notes.txt", "data/x", "wandb/mine", "checkpoints/best/x", "checkpoints/iter_0000001/extra"):
        (path := directory / foreign).parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with pytest.raises(NotOursError, match="no run wrote"):
            removal.remove_files(only(store))
        assert (directory / "metrics.jsonl").exists() and path.exists()
        path.unlink()
        if path.parent.name != "wandb":
            path.parent.rmdir() if path.parent != directory else None
    (directory / "checkpoints" / "link").symlink_to(store)
    with pytest.raises(NotOursError):
        removal.remove_files(only(store))
    (directory / "checkpoints" / "link").unlink()
    removal.remove_files(only(store))
    assert not directory.exists() and store.exists()


def test_a_removal_that_is_interrupted_anywhere_can_be_ended(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within a folder that a step has made in a run's directory."""
    directory, unlink, left = write_run(store, "a", steps=1), os.unlink, 0

    def make(work: steps.Work) -> dict[str, Any]:
        for name in ("one", "two"):
            (work.folder / name).touch()
        return {}

    steps.run(steps.Step("evaluation", 1, directory / "evaluation", {}), make)
    (directory / ".evaluation.lock").unlink()
    kept, run = shutil.copytree(directory, tmp_path / "kept"), only(store)

    def unlinking(*given: Any, **named: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        unlink(*given, **named)

    for left_after in range(len([path for path in kept.rglob("*") if path.is_file()])):
        shutil.rmtree(directory)
        shutil.copytree(kept, directory)
        left = left_after
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "unlink", unlinking)
            removal.remove_files(run)
        removal.remove_files(run)
        assert not directory.exists()
        directory.mkdir()


def test_files_of_another_run_or_of_one_at_work_stay(store: Path) -> None:
    directory = write_run(store, "a")
    run = only(store)
    with owned(directory / ".lock", "the run"), pytest.raises(BusyError):
        removal.remove_files(run)
    (directory / "run.json").write_text('{"id": "another"}')
    with pytest.raises(NotOursError, match="not the directory"):
        removal.remove_files(run)
    assert (directory / "metrics.jsonl").exists()


def test_bars() -> None:
    assert sparkline([1, 2, 3, math.nan, 8]) == "▁▂▃·█"
    assert sparkline([]) == "" and sparkline([2.0, 2.0]) == "▁▁" and sparkline([math.inf]) == "·"
    assert len(sparkline([float(i) for i in range(1000)])) == 40


def test_a_reader_leaves_the_store_as_it_is(store: Path) -> None:
    write_run(store, "a")
    before = store.read_bytes()
    list_runs(store)
    ask("SELECT * FROM runs", store)
    assert store.read_bytes() == before
    assert read_records(store.parent / "a" / "metrics.jsonl")
    with sqlite3.connect(store) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
