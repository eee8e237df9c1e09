"""One command: its exit code, its folder, and the signals that are passed on to it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vpmoe.commands import Command, CommandFailed, Interrupted, run_command

POLITE = """
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path("stopped").write_text(signal.Signals(number).name)
    sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
pathlib.Path("ready").write_text("")
time.sleep(60)
"""


def test_runs_in_the_folder(tmp_path: Path) -> None:
    run_command(Command(("python", "-c", "open('here', 'w')")), tmp_path)
    assert (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_exit_code_becomes_ours(tmp_path: Path, code: str, expected: int) -> None:
    with pytest.raises(CommandFailed) as caught:
        run_command(Command(("python", "-c", code)), tmp_path)
    assert caught.value.exit_code == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_passed_on_and_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    def send_when_ready() -> None:
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=send_when_ready)
    sender.start()
    with pytest.raises(Interrupted) as caught:
        run_command(Command(("python", "-c", POLITE)), tmp_path)
    sender.join()
    assert caught.value.exit_code == 128 + number
    assert (tmp_path / "stopped").read_text() == number.name
    assert signal.getsignal(number) is before


def test_shown_as_typed() -> None:
    command = Command(("vpmoe", "eval", "nano", "a run", "--limit", ""))
    assert str(command) == "vpmoe eval nano 'a run' --limit ''"
    assert command.executable_words()[1:4] == ["-m", "vpmoe.cli", "eval"]
