"""Records that pages keep in memory: those of the files, of which only what is new is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.vpmoe.runs.written_runs import write_run
from vpmoe.app import records
from vpmoe.app.records import Records
from vpmoe.runs.database import answer
from vpmoe.runs.queries import series, tags_of
from vpmoe.runs.registry import RunEntry, list_runs

EVERY = "SELECT * FROM metrics ORDER BY run, step, tag, value"


@pytest.fixture
def runs(tmp_path: Path) -> list[RunEntry]:
    for name in ("a", "it's"):
        write_run(tmp_path / "runs" / "registry.sqlite", name, steps=20)
    return list_runs(tmp_path / "runs" / "registry.sqlite")


def are_the_files(kept: Records, runs: list[RunEntry]) -> int:
    """Hold all that is kept of some runs to their files; returns how many records that are."""
    here, there = kept.answer(runs, EVERY), answer(runs, EVERY)
    assert here.equals(there)
    return len(there)


def appended(run: RunEntry, *lines: str) -> int:
    text = "".join(lines)
    with run.metrics.open("a") as stream:
        stream.write(text)
    return len(text)


def line(step: int, value: object = 0.5, tag: str = "loss/total") -> str:
    return json.dumps({"step": step, "tag": tag, "value": value}) + "\n"


def test_of_a_file_that_grows_what_was_appended_is_read(runs: list[RunEntry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_PIECE_BYTES", 1000)  # a few lines
    kept, size = Records(), sum(run.metrics.stat().st_size for run in runs)
    before = are_the_files(kept, runs)
    assert kept.bytes_read == size and are_the_files(kept, runs[:1]) < before
    assert are_the_files(kept, runs) == before and kept.bytes_read == size, "what is as it was is not read again"
    size += appended(runs[0], line(21), line(22, "nan"), "rubbish\n", '{"step": 23, "tag": "loss/t')
    assert are_the_files(kept, runs) == before + 2 and kept.bytes_read == size
    appended(runs[0], 'otal", "value": 7}\n', line(24, tag="it's new"))
    assert are_the_files(kept, runs) == before + 4 and kept.bytes_read < size + 200
    assert tags_of(runs, answer=kept.answer) == tags_of(runs)
    for by in ("step", "tokens", "time"):
        curves = {"by": by, "points": 8}
        assert series(runs, ["loss/total"], **curves, answer=kept.answer).equals(series(runs, ["loss/total"], **curves))


def test_a_file_that_is_another_is_read_anew(runs: list[RunEntry]) -> None:
    kept, path = Records(), runs[0].metrics
    are_the_files(kept, runs)
    whole = path.read_text()
    path.with_name("new").write_text(whole[: len(whole) // 2].rpartition("\n")[0] + "\n" + line(99) * 200)
    path.with_name("new").rename(path)  # as a run that is resumed does, and is longer by now
    are_the_files(kept, runs)
    for text in (whole[:200].rpartition("\n")[0] + "\n", line(7, 1.0) + whole, line(7, 2.0) + whole, "", line(1)):
        path.write_text(text)  # as an editor does
        are_the_files(kept, runs)
    path.unlink()
    are_the_files(kept, runs)
    assert kept.answer([], EVERY).empty


def test_the_runs_looked_at_least_recently_go_first(runs: list[RunEntry], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Records()
    are_the_files(kept, runs)
    monkeypatch.setattr(records, "_KEPT_BYTES", 1)
    read = kept.bytes_read
    are_the_files(kept, runs[:1])
    assert kept.bytes_read == read and list(kept._files) == [runs[0].id], "what is asked for stays"
    are_the_files(kept, runs)
    assert kept.bytes_read == read + runs[1].metrics.stat().st_size
