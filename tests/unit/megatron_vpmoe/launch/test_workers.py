"""Worker processes of a stand-in module: their exit codes and the signals they are told of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # two processes under a launcher in each

WORKER = """
import os, pathlib, signal, sys, time
kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank = os.environ["RANK"]
signals = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda n, _frame: signals.append(n))
if kind == "exit":
    sys.exit(int(sys.argv[3]) if rank == "0" else 0)
if kind == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "environment":
    (folder / f"environment{rank}").write_text(" ".join(os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    sys.exit(0)
(folder / f"ready{rank}").touch()
while not signals:
    time.sleep(0.02)
if kind == "stop":
    time.sleep(2)  # a step and a checkpoint
    (folder / f"saved{rank}").write_text(" ".join(str(int(n)) for n in signals))
"""
DRIVER = """
import sys
from megatron_vpmoe.config import load_config
from megatron_vpmoe.launch.workers import Nodes, run_workers
sys.exit(run_workers(load_config(sys.argv[1]), Nodes(1, 0, None), "standin_worker", sys.argv[2:]))
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(run_yaml: Path, tmp_path: Path) -> Iterator[Start]:
    """Start the launcher in its own process over two stand-in workers; leftovers are ended after the test."""
    (tmp_path / "standin_worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, str(run_yaml), arguments[0], str(tmp_path), *arguments[1:]]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"never appeared: {paths}"
        time.sleep(0.05)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def test_workers_know_their_ranks(start: Start, tmp_path: Path) -> None:
    assert finish(start("environment"))[0] == 0
    assert [(tmp_path / f"environment{rank}").read_text() for rank in (0, 1)] == ["0 2 0", "1 2 1"]


@pytest.mark.parametrize(("code", "said"), [(2, ""), (3, "worker 0 failed with exit code 3")])
def test_a_worker_s_exit_code_is_the_launcher_s(start: Start, code: int, said: str) -> None:
    result, error = finish(start("exit", str(code)))
    assert result == code
    assert said in error
    assert "Traceback" not in error
    assert "ChildFailedError" not in error


def test_a_killed_worker_is_named(start: Start, tmp_path: Path) -> None:
    result, error = finish(start("kill"))
    assert result == 128 + signal.SIGKILL
    assert "worker 1 was ended by SIGKILL" in error


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGTERM)],
)
def test_a_signal_lets_the_workers_save_and_ends_with_zero(
    start: Start, tmp_path: Path, sent: signal.Signals, arrives: signal.Signals
) -> None:
    process = start("stop")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(sent)
    time.sleep(0.3)
    if sent != signal.SIGINT:
        process.send_signal(sent)  # an impatient scheduler: not handed on again
    result, error = finish(process)
    assert result == 0, error
    assert sent.name in error
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [str(int(arrives))] * 2
