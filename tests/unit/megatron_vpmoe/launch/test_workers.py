"""Worker processes of a stand-in module: their exit codes and the signals they are told of."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_vpmoe.launch.watch import Watch
from megatron_vpmoe.runtime.endings import Ending
from tests import training_runs
from tests.fixtures_dataset import small_dataset
from tests.workers import Started

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
if kind == "save" and sys.argv[3] == "ready":
    signal.signal(signal.SIGUSR1, lambda *_: (folder / f"asked{rank}").touch())
elif kind == "save":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
(folder / f"ready{rank}").touch()
if kind == "deaf":
    time.sleep(60)
while not signals:
    time.sleep(0.02)
if kind == "stop":
    time.sleep(2)  # a step and a checkpoint
    (folder / f"saved{rank}").write_text(" ".join(str(int(n)) for n in signals))
"""
# As the trainer ends, with a collective in which the others wait.
FAULTY = """
import os, pathlib, signal, sys
from datetime import timedelta
import torch, torch.distributed as dist
from megatron_vpmoe import pretrain
from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.runtime import endings

def run(arguments):
    kind, folder = arguments[0], pathlib.Path(arguments[1])
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=100 if kind == "stopped" else 6))
    dist.barrier()
    if kind == "same":
        raise CheckpointError("the cause of all", source=str(folder))
    if rank == 1:
        if kind == "error":
            raise CheckpointError("the cause of rank 1", source=str(folder))
        if kind == "system":
            (folder / "ready").mkdir()
            (folder / "ready").write_text("x")
        if kind == "bug":
            raise ValueError("a bug of rank 1")
        if kind == "left":
            os._exit(0)
        if kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))

pretrain.run = run
endings.leave(pretrain.main())
"""
Start = Callable[..., Started]


@pytest.fixture
def start(run_yaml: Path, tmp_path: Path) -> Iterator[Start]:
    """Start the launcher in its own process over two stand-in workers; leftovers are ended after the test."""
    (tmp_path / "standin_worker.py").write_text(WORKER)
    (tmp_path / "faulty_worker.py").write_text(FAULTY)
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    started: list[Started] = []

    def run(*arguments: str, module: str = "standin_worker") -> Started:
        words = (str(run_yaml), module, arguments[0], str(tmp_path), *arguments[1:])
        process = Started(training_runs.launcher, *words, environment=environment)
        started.append(process)
        return process

    yield run
    for each in started:
        each.process.kill()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"never appeared: {paths}"
        time.sleep(0.05)


def finish(started: Started) -> tuple[int, str]:
    done = started.finish(timeout=60)
    return done.returncode, done.stderr


def send(started: Started, number: signal.Signals) -> None:
    os.kill(started.process.pid or 0, number)


def test_workers_know_their_ranks(start: Start, tmp_path: Path) -> None:
    assert finish(start("environment"))[0] == 0
    assert [(tmp_path / f"environment{rank}").read_text() for rank in (0, 1)] == ["0 2 0", "1 2 1"]


@pytest.mark.parametrize(("code", "said"), [(2, ""), (3, "worker 0: it left with exit code 3")])
def test_a_worker_s_exit_code_is_the_launcher_s(start: Start, code: int, said: str) -> None:
    result, error = finish(start("exit", str(code)))
    assert result == code
    assert said in error
    assert "Traceback" not in error
    assert "ChildFailedError" not in error


def test_a_killed_worker_is_named(start: Start, tmp_path: Path) -> None:
    result, error = finish(start("kill"))
    assert result == 128 + signal.SIGKILL
    assert "worker 1: it was ended by SIGKILL" in error


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM)],
)
def test_a_signal_lets_the_workers_save_and_ends_with_zero(
    start: Start, tmp_path: Path, sent: signal.Signals, arrives: signal.Signals
) -> None:
    process = start("stop")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    send(process, sent)
    time.sleep(0.3)
    if sent != signal.SIGINT:
        send(process, sent)  # an impatient scheduler: not handed on again
    result, error = finish(process)
    assert result == 0, error
    assert sent.name in error
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [str(int(arrives))] * 2


@pytest.mark.parametrize(
    ("state", "asked", "said"), [("ready", 1, "saving as soon"), ("early", 0, "there is nothing to save yet")]
)
def test_one_worker_is_asked_to_save_once_there_is_something(
    start: Start, tmp_path: Path, state: str, asked: int, said: str
) -> None:
    """All that heard of it might do so in two steps, and save in both."""
    process = start("save", state)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    send(process, signal.SIGUSR1)
    time.sleep(1)
    send(process, signal.SIGTERM)
    result, error = finish(process)
    assert result == 0 and f"SIGUSR1: {said}" in error
    assert len(list(tmp_path.glob("asked*"))) == asked


@pytest.mark.parametrize(
    ("kind", "code", "first", "absent"),
    [
        ("error", 2, "worker 1: CheckpointError: the cause of rank 1", "Traceback"),
        ("same", 2, "CheckpointError: the cause of all", "Traceback"),
        ("system", 2, "worker 1: VpmoeError: a file or folder cannot be used: Is a directory", "Traceback"),
        ("bug", 1, "worker 1: Traceback", "gloo"),
        ("left", 1, "worker 1: it left with exit code 0 before the run was done", "gloo"),
    ],
)
def test_the_first_cause_is_named_whichever_rank_it_came_from(
    start: Start, kind: str, code: int, first: str, absent: str
) -> None:
    result, error = finish(start(kind, module="faulty_worker"))
    said = [line for line in error.splitlines() if "warn" not in line.lower()]
    assert result == code, error
    assert first in said[0], error
    assert absent not in error
    assert error.count("the cause of") <= 1


def test_a_second_interrupt_ends_the_workers_at_once(start: Start, tmp_path: Path) -> None:
    process = start("deaf")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    send(process, signal.SIGINT)
    time.sleep(0.5)
    send(process, signal.SIGINT)
    result, error = finish(process)
    assert result == 128 + signal.SIGINT
    assert "stopped by SIGINT before the workers had left" in error
    assert "Traceback" not in error


def test_a_stopped_worker_is_named_while_the_others_wait(start: Start) -> None:
    process = start("stopped", module="faulty_worker")
    deadline = time.monotonic() + 60
    while not (found := re.search(r"worker 1 is stopped \(SIGSTOP\).* (\d+)\n", process.errors())):
        assert process.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int(found[1]), signal.SIGCONT)
    assert finish(process)[0] == 0


@pytest.mark.parametrize(
    ("gone", "codes", "stopped", "expected"),
    [
        ({0: 9.0, 1: 15.0}, {0: 1, 1: -9}, {1}, "worker 0: it waited in vain for worker 1, which is stopped"),
        ({0: 9.0}, {0: 1}, set(), "worker 0: another process has left it (closed)"),
        ({1: 9.0, 0: 9.1}, {0: 1, 1: -9}, set(), "worker 1: it was ended by SIGKILL"),
        ({1: 3.0, 0: 9.0}, {0: 1}, set(), "worker 1: it left with exit code 0"),
        ({0: 9.0, 1: 14.5}, {0: 1, 1: -9}, set(), "worker 0: another process has left it (closed)"),
    ],
)
def test_who_is_blamed_where_one_lost_another(
    gone: dict[int, float],
    codes: dict[int, int],
    stopped: set[int],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Worker 0 says at second 9 that a connection closed; the launcher ends what is left 5 seconds later."""
    watch = Watch("nobody", 2, tmp_path)
    watch.gone, watch.stopped = gone, stopped
    watch.verdict({0: Ending("lost", "closed", 1, 9.0)}, codes)
    assert expected in capsys.readouterr().err


def test_a_crash_after_the_end_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch("nobody", 2, tmp_path)
    watch.gone = {0: 9.0, 1: 9.5}
    done = {rank: Ending("done", "", 0, 8.0) for rank in (0, 1)}
    assert watch.verdict(done, {1: -signal.SIGSEGV}) == 128 + signal.SIGSEGV
    assert "worker 1: it was ended by SIGSEGV after the run was done" in capsys.readouterr().err


@pytest.mark.parametrize("loaded", ["pydantic_core", "libtorch_cpu", "worker"])
def test_an_early_interrupt_is_no_traceback(run_yaml: Path, tmp_path: Path, repository: Path, loaded: str) -> None:
    """While the launcher imports, while it imports torch, and while its workers do."""
    dataset = small_dataset(tmp_path / "set", seq_length=64)
    command = [sys.executable, "-m", "vpmoe.cli", "train", str(run_yaml), "--data-path", str(dataset)]
    process = subprocess.Popen(
        [*command, "--padded-vocab-size", "64"], env=training_runs.ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not _has_loaded(process.pid, loaded):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT, 1), error
    assert "Traceback" not in error


def _has_loaded(pid: int, what: str) -> bool:
    try:
        if what != "worker":
            return what in Path(f"/proc/{pid}/maps").read_text()
        children = psutil.Process(pid).children()
        return any(_has_loaded(child.pid, "libtorch_cpu") for child in children if "RANK" in child.environ())
    except (OSError, psutil.Error):
        return False
