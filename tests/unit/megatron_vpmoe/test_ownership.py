"""One owner at a time, by process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_vpmoe import ownership
from megatron_vpmoe.errors import BusyError, NotOursError
from megatron_vpmoe.files import json_bytes
from megatron_vpmoe.ownership import check_free, owned


def taken_elsewhere(lock: Path) -> subprocess.CompletedProcess[str]:
    """What another process meets."""
    program = (
        "import sys; from pathlib import Path; from megatron_vpmoe.ownership import owned\n"
        f"with owned(Path({str(lock)!r}), 'the run'): print('taken')"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_owner_stays_the_owner_after_asking_again(tmp_path: Path) -> None:
    """A record lock ends when any descriptor of its file is closed: asking must not open the file."""
    lock = tmp_path / ".lock"
    with owned(lock, "the run") as former:
        assert former is None
        for ask in (owned(lock, "the run").__enter__, lambda: check_free(lock, "the run")):
            with pytest.raises(BusyError, match=f"process {os.getpid()} on"):
                ask()
        elsewhere = taken_elsewhere(lock)
        assert f"process {os.getpid()} on" in elsewhere.stderr
        assert not elsewhere.stdout
    assert taken_elsewhere(lock).stdout == "taken\n"


def test_a_forked_child_does_not_hold_it_on(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    program = (
        "import os, time; from pathlib import Path; from megatron_vpmoe.ownership import owned\n"
        f"lock = owned(Path({str(lock)!r}), 'the run'); lock.__enter__()\n"
        "child = os.fork()\n"
        "if child == 0:\n    os.close(1); os.close(2); time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    child = int(died.stdout)
    try:
        with owned(lock, "the run") as former:
            assert former is not None
            assert "pid" in former
    finally:
        os.kill(child, 9)


def test_a_file_of_the_users_is_no_lock(tmp_path: Path) -> None:
    lock = tmp_path / ".data.lock"
    lock.write_text("years of work")
    with pytest.raises(NotOursError, match=r"\.data\.lock"), owned(lock, "data"):
        pytest.fail("taken")
    assert lock.read_text() == "years of work"


@pytest.mark.parametrize("left", [b"", b"\0" * 80, b'{\n  "host": "node', b'{\n  "ho', b'{\n  "host": "n",\n\0\0'])
def test_what_a_lost_disk_leaves_of_a_lock_is_no_hindrance(tmp_path: Path, left: bytes) -> None:
    lock = tmp_path / ".lock"
    lock.write_bytes(left)
    with owned(lock, "the run") as former:
        assert former is None and b'"pid"' in lock.read_bytes()


def test_an_owner_on_another_host_is_watched_before_it_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a file system whose locks do not reach that host: it touches its file as long as it is there."""
    monkeypatch.setattr(ownership, "_SECONDS_WATCHED", 0.5)
    lock = tmp_path / ".lock"
    lock.write_bytes(json_bytes({"host": "elsewhere", "pid": 7, "since": "then"}))
    touching = threading.Event()

    def touch() -> None:
        while not touching.wait(0.02):
            os.utime(lock)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(BusyError, match="process 7 on elsewhere works there since then"), owned(lock, "the run"):
        pytest.fail("taken")
    touching.set()
    thread.join()
    assert b"elsewhere" in lock.read_bytes()
    with owned(lock, "the run") as former:
        assert former == {"host": "elsewhere", "pid": 7, "since": "then"}
    assert capsys.readouterr().err.count("process 7 on elsewhere did not take leave") == 2


def test_an_owner_touches_its_file_until_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_SECONDS_BETWEEN_TOUCHES", 0.01)
    lock = tmp_path / ".lock"
    with owned(lock, "the run"):
        for _ in range(2):
            before, deadline = lock.stat().st_mtime_ns, time.monotonic() + 30
            while lock.stat().st_mtime_ns == before:
                assert time.monotonic() < deadline
                time.sleep(0.01)
