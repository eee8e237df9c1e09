"""Plain torchrun, two agents on one machine: a group started again resumes by itself, a worker that hangs ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests import training_runs
from tests.fixtures_dataset import small_dataset
from tests.training_runs import checkpoint_tensors, command

pytestmark = pytest.mark.slow

STEPS = 40
ENVIRONMENT = {**training_runs.ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set")


@contextmanager
def agents(run_dir: Path, dataset: Path, nnodes: str, **changes: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Two of torchrun, of one worker each; what is left of them is ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--nnodes", nnodes, "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    flags += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic", "--local-addr", "127.0.0.1"]
    flags += ["--rdzv-conf", "last_call_timeout=5", "-m"]
    changes = {"sample_interval": None, "eval_interval": None, "keep_last": 99, **changes}
    words = [sys.executable, "-m", "torch.distributed.run", *flags, *command(run_dir, dataset, **changes)[2:]]
    with ExitStack() as ended:
        yield [ended.enter_context(ended_after(words, run_dir.parent / f"agent{number}")) for number in range(2)]


@contextmanager
def ended_after(words: list[str], output: Path) -> Iterator[subprocess.Popen[str]]:
    with output.open("w") as stream:
        process = subprocess.Popen(words, env=ENVIRONMENT, stdout=stream, stderr=stream, text=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def worker_of(agent: subprocess.Popen[str]) -> int:
    return next(child.pid for child in psutil.Process(agent.pid).children() if "RANK" in child.environ())


def test_a_worker_killed_makes_the_group_resume_to_the_straight_run(dataset: Path, tmp_path: Path) -> None:
    straight, restarted = tmp_path / "straight" / "run", tmp_path / "restarted" / "run"
    for run_dir in (straight, restarted):
        run_dir.parent.mkdir()
    training_runs.train_in_workers(
        2, straight, dataset, train_iters=STEPS, sample_interval=None, eval_interval=None, keep_last=99
    )
    with agents(restarted, dataset, "2", train_iters=STEPS) as both:
        training_runs.reach(8, restarted, lambda: all(agent.poll() is None for agent in both))
        os.kill(worker_of(both[1]), signal.SIGKILL)
        codes = [agent.wait(240) for agent in both]
    said = "".join((restarted.parent / f"agent{number}").read_text() for number in (0, 1))
    assert codes == [0, 0], said
    assert "nano_stage1: continues" in said and f"done, step {STEPS}" in said
    assert training_runs.losses(restarted) == training_runs.losses(straight)
    tensors = [checkpoint_tensors(run / "checkpoints" / f"iter_{STEPS:07d}") for run in (straight, restarted)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_an_agent_that_goes_leaves_the_others_to_go_on(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with agents(run_dir, dataset, "1:2", train_iters=STEPS) as both:
        training_runs.reach(6, run_dir, lambda: all(agent.poll() is None for agent in both))
        left, gone = both if keeps_the_store(both[0]) else both[::-1]
        for process in (*psutil.Process(gone.pid).children(recursive=True), psutil.Process(gone.pid)):
            process.kill()
        assert left.wait(240) == 0, "".join((tmp_path / f"agent{number}").read_text() for number in (0, 1))
    assert set(training_runs.losses(run_dir)) == set(range(1, STEPS + 1))
    said = "".join((tmp_path / f"agent{number}").read_text() for number in (0, 1))
    assert "saved by 2 processes, continued by 1" in said


def keeps_the_store(agent: subprocess.Popen[str]) -> bool:
    """Whether the agents meet at this one."""
    port = int(next(word for word in agent.args if word.startswith("127.0.0.1:")).split(":")[1])  # type: ignore[union-attr]
    connections = psutil.Process(agent.pid).net_connections()
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections)


def test_a_worker_without_our_launcher_ends_itself_where_it_hangs(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = command(run_dir, dataset, train_iters=10_000, stall_timeout_seconds=3, nproc_per_node=2)
    flags = ["--nnodes", "1", "--nproc-per-node", "2", "--standalone", "-m"]
    words = [sys.executable, "-m", "torch.distributed.run", *flags, *words[2:]]
    with ended_after(words, tmp_path / "agent") as agent:
        training_runs.reach(3, run_dir, lambda: agent.poll() is None)
        workers = [child.pid for child in psutil.Process(agent.pid).children() if "RANK" in child.environ()]
        os.kill(workers[1], signal.SIGSTOP)
        stopped = time.monotonic()
        assert agent.wait(120) == 1
        assert time.monotonic() - stopped < 100
    said = (tmp_path / "agent").read_text()
    assert "no sign of life for" in said, said
    assert "loop.py" in said and "in _train" in said, said
    assert not any(psutil.pid_exists(pid) for pid in workers)
