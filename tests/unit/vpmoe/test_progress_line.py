"""Progress off a terminal: a line now and then with rates and what is left, a last one at the end, nothing if quiet."""

from __future__ import annotations

import re

import pytest

from vpmoe import progress
from vpmoe.progress import Progress


@pytest.fixture
def _every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)


def test_the_end_is_told_and_nothing_before_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("converting", 1000, done_before=400) as counted:
        for _ in range(600):
            counted.add(1)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert re.fullmatch(r"converting: 1,000/1,000 rows  [\d,]+ rows/s  done\n", shown.err)


@pytest.mark.usefixtures("_every_line")
def test_lines_tell_rates_tokens_and_share(capsys: pytest.CaptureFixture[str]) -> None:
    shares = iter((0.25, 0.5, 0.5))
    with Progress("building", None, unit="MB", scale=1e6, share=lambda: next(shares)) as counted:
        for _ in range(2):
            counted.add(2_000_000, 10, doing="shard_00")
    first, second, last = capsys.readouterr().err.splitlines()
    assert re.match(r"building: 2\.0 MB  [\d,.]+ MB/s  (\d+\.\d\d M|[\d,]+) tokens/s  shard_00", first)
    assert re.search(r"shard_00  50%, about \d+ s left$", second) or second.endswith("shard_00")
    assert last.startswith("building: 4.0 MB") and "done" in last


@pytest.mark.usefixtures("_every_line")
def test_an_error_is_no_end_and_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), Progress("a", 10) as counted:
        counted.add(1)
        raise ValueError("x")
    assert "done" not in capsys.readouterr().err
    with Progress("a", 10, quiet=True) as counted:
        counted.add(10)
    with Progress("nothing was to be done", 0):
        pass
    assert capsys.readouterr().err == ""
