"""One owner at a time, by process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vpmoe.errors import BusyError, NotOursError
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
