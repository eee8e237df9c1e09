"""The report over all reports: every number with its interval and its change, whatever a run is called."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.unit.vpmoe.eval.written_reports import write_choices, write_texts
from vpmoe.cli import main
from vpmoe.eval.suites.overview import read_reports

EVIL = "<script>alert(1)</script>|[red]$x$\x1b[2J"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    core8 = tmp_path / "reports" / "core8"
    write_choices(core8 / "run_2.json", "second", {"easy": [True] * 20 + [False] * 20, "hard": [False] * 40})
    write_choices(core8 / "run_10.json", EVIL, {"easy": [True] * 40, "hard": [False] * 40})
    third = write_choices(core8 / "run_11.json", "third", {"easy": [True] * 39})
    report = json.loads(third.read_text())
    third.write_text(json.dumps({**report, "settings": {**report["settings"], "items": 500}}))
    write_texts(tmp_path / "reports" / "text" / "run_2.json", "second", {"final": [(3.0, 4), (2.0, 5)]})
    (tmp_path / "reports" / "other.json").write_text("{}")
    return tmp_path / "reports"


@pytest.mark.slow
def test_everything_is_shown_and_written(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["eval", "report", str(folder), "--output-dir", str(folder / "out")]) == 0
    told = capsys.readouterr().out
    assert "\x1b[2J" not in told
    rows = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in told.splitlines()]
    easy = next(row for row in rows if any("script" in cell for cell in row))
    assert "+0.5000" in easy and "better" in easy
    assert any("not paired" in row and "third" in row for row in rows)
    assert "settings.items differs: 50, 500" in told
    assert "core8_centered_mean" in told and "bits_per_byte" in told and "final" in told
    page, markdown = ((folder / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "<script" not in page and "&lt;script" in page and 'src="data:image/png;base64,' in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "\x1b" not in page + markdown
    table = [line for line in markdown.splitlines() if line.startswith("| easy")]
    assert len(table) == 3 and all(len(re.findall(r"(?<!\\)\|", line)) == 10 for line in table)
    assert (folder / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    before = (folder / "out" / "report.html").read_bytes()
    assert main(["eval", "report", str(folder), "--output-dir", str(folder / "out")]) == 0
    assert (folder / "out" / "report.html").read_bytes() == before
    (folder / "out" / "report.md").write_text("years of work")
    assert main(["eval", "report", str(folder), "--output-dir", str(folder / "out")]) == 2


@pytest.mark.parametrize("width", [72, 80, 100, 200])
@pytest.mark.parametrize("command", ["report", "compare"])
def test_nothing_is_cut_on_a_narrow_terminal(
    command: str, width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    names = ["lambada_openai", "special_tokens_as_text", "bigbench_repeat_copy_logic"]
    runs = ["stage1_of_a_long_name, step 2000", "stage2"]
    paths = [
        str(write_choices(tmp_path / f"{at}.json", run, {name: [bool(at)] * 9 for name in names}))
        for at, run in enumerate(runs)
    ]
    assert main(["eval", command, *paths]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= width and "…" not in told
    for text in (*names, *runs, "core8_centered_mean", "accuracy", "+1.0000", "better"):
        assert text in told


def test_means_of_other_tasks_have_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    write_choices(tmp_path / "1.json", "one", {"easy": [True] * 40, "hard": [False] * 40})
    write_choices(tmp_path / "2.json", "two", {"easy": [True] * 40})
    assert main(["eval", "report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "two and one, core8: core8_centered_mean is of other tasks or chances" in told
    assert told.count("+0.0000") == 1 and "not paired" not in told


def test_the_order_is_that_of_the_command_line_and_of_numbers(folder: Path) -> None:
    named = [folder / "core8" / "run_11.json", folder]
    assert [one.path.name for one in read_reports(named)] == ["run_11.json", "run_2.json", "run_10.json", "run_2.json"]


def test_floors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "report", str(folder), "--fail-below"]
    assert main([*command, "hard=0", "--fail-below", "easy=0.5"]) == 0
    capsys.readouterr()
    assert main([*command, "easy=0.51", "--fail-below", "core8_centered_mean=-1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "easy of second is 0.5000 [0.352, 0.648], below 0.51"
    for floor, fault in (
        ("tastes=1", "there is no task 'tastes'"),
        ("final=1", "of final less is better"),
        ("easy", "'easy' is no floor"),
        ("easy=nan", "'easy=nan' is no floor"),
        ("=1", "'=1' is no floor"),
    ):
        assert main([*command, floor]) == 2
        assert fault in capsys.readouterr().err
    assert main([*command, "easy=0.9", "--fail-below", "easy=0.1"]) == 2
    assert "easy has two floors" in capsys.readouterr().err


def test_no_report_and_a_damaged_one(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "report", str(tmp_path / "none.json")]) == 2 and "none.json" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["eval", "report", str(tmp_path / "empty")]) == 2 and "no report of a suite" in capsys.readouterr().err
    (folder / "core8" / "run_2.json").write_text('{"kind": "eval_suite"')
    assert main(["eval", "report", str(folder)]) == 2 and "run_2.json" in capsys.readouterr().err
