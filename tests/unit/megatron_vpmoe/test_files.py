"""Lines of JSON: split at the line feed alone, torn ends known for what they are, broken lines named."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megatron_vpmoe.errors import DataError, NonFiniteError
from megatron_vpmoe.files import json_bytes, read_json, read_json_lines, sha256_of_json, write_atomically


def test_lines_are_split_at_the_line_feed_alone(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes('{"a": "x\u2028y\x85z"}\n\n  \n{"a": 2}\r\n'.encode())
    assert list(read_json_lines(tmp_path / "log")) == [(1, {"a": "x\u2028y\x85z"}), (4, {"a": 2})]


def test_a_last_line_without_line_feed_is_torn_in_our_logs_and_whole_in_a_users_file(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"1\n2")
    assert list(read_json_lines(tmp_path / "log")) == [(1, 1)]
    assert list(read_json_lines(tmp_path / "log", ours=False)) == [(1, 1), (2, 2)]


@pytest.mark.parametrize("line", [b"{", b'{"a": 1}x', b'"\xff"', b"[" * 100_000])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "log").write_bytes(b"1\n" + line + b"\n3\n")
    lines = read_json_lines(tmp_path / "log")
    assert next(lines) == (1, 1)
    with pytest.raises(DataError, match=r"line 2 is not JSON(.|\n)*log:2"):
        next(lines)


def test_a_name_that_is_not_utf8_goes_through_json_and_back(tmp_path: Path) -> None:
    value = {"name": b"rows_\xff.jsonl".decode(errors="surrogateescape")}
    (tmp_path / "record").write_bytes(json_bytes(value))
    assert read_json(tmp_path / "record") == value
    assert sha256_of_json(value) != sha256_of_json({"name": "rows_.jsonl"})


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=str(tmp_path / "page.html")):
        write_atomically(tmp_path / "page.html", b"page")
    assert not list(tmp_path.iterdir())


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_json_lines(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_json(value: float) -> None:
    with pytest.raises(NonFiniteError, match=rf"^report\.losses\.1 is {value}"):
        json_bytes({"report": {"losses": (0.5, value)}})
