"""A run directory has one owner at a time, whoever comes: other processes, other launchers, several at once."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_vpmoe import ownership
from megatron_vpmoe.errors import BusyError
from tests import training_runs
from tests.crash.phases import SMALL
from tests.fixtures_dataset import small_dataset
from tests.workers import Started, described_ranks

pytestmark = pytest.mark.slow


def _take(lock: str, go: str, done: str) -> int:
    """One of several that begin as ``go`` appears; the owner stays until ``done`` does."""
    while not os.path.exists(go):
        time.sleep(0.0005)
    try:
        with ownership.owned(Path(lock), "the run"):
            print("taken", flush=True)
            while not os.path.exists(done):
                time.sleep(0.01)
            return 0
    except BusyError as error:
        print(error)
        return 2


def test_of_several_that_start_at_once_one_gets_it_and_the_others_name_it(tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths = [str(folder / name) for name in ("run/.lock", "go", "done")]
        started = [Started(_take, *paths, environment={}) for _ in range(4)]
        (folder / "go").touch()
        deadline = time.monotonic() + 120
        while sum(each.process.is_alive() for each in started) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (folder / "done").touch()
        ends = [each.finish() for each in started]
        assert sorted(end.returncode for end in ends) == [0, 2, 2, 2]
        owner = started[[end.returncode for end in ends].index(0)].process.pid
        named = f"process {owner} on {socket.gethostname()}"
        assert all(named in end.stdout for end in ends if end.returncode)


def _far_away(lock: str, host: str) -> int:
    """Take it on another host, where this one's locks are not seen; stays."""
    with _elsewhere(host):
        try:
            with ownership.owned(Path(lock), "the run") as former:
                print("taken after", former and former["host"], flush=True)
                Path(lock).with_name(host).touch()
                time.sleep(300)
        except BusyError as error:
            print(error)
            return 2
    return 0


@contextmanager
def _elsewhere(host: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket, "gethostname", lambda: host)
        patched.setattr(fcntl, "lockf", lambda *_: None)
        patched.setattr(ownership, "_SECONDS_BETWEEN_TOUCHES", 0.1)
        patched.setattr(ownership, "_SECONDS_WATCHED", 5.0)
        yield


def test_without_locks_between_hosts_an_owner_at_work_is_seen_and_a_dead_one_too(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"

    def begun(host: str) -> Started:
        started, deadline = Started(_far_away, str(lock), host, environment={}), time.monotonic() + 120
        while not (tmp_path / host).exists() and started.process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return started

    first = begun("node-a")
    refused = begun("node-b").finish()
    assert refused.returncode == 2 and f"process {first.process.pid} on node-a works there" in refused.stdout
    os.kill(first.process.pid or 0, signal.SIGKILL)
    first.finish()
    second = begun("node-c")
    os.kill(second.process.pid or 0, signal.SIGKILL)
    assert "taken after node-a" in second.finish().stdout


def _launch(arguments: list[str]) -> int:
    from megatron_vpmoe.launch.__main__ import main

    return main(arguments)


def test_a_run_of_two_processes_owns_its_directory_against_workers_and_launchers(tmp_path: Path) -> None:
    """It is stopped meanwhile, which makes it no less the owner. Killed, it is no hindrance, and is named."""
    dataset, run = small_dataset(tmp_path / "dataset", train=64, valid=4), tmp_path / "run"
    fields = {**SMALL, "nproc_per_node": 2, "resume": True}
    arguments = training_runs.command(run, dataset, **fields)[3:]
    owners = [Started(training_runs.worker, arguments, environment=each) for each in described_ranks(2)]
    pids = [each.process.pid or 0 for each in owners]
    training_runs.reach(3, run, owners[0].process.is_alive)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    logged = (run / "metrics.jsonl").read_bytes()
    second = training_runs.train(run, dataset, **{**fields, "nproc_per_node": 1})
    launched = Started(_launch, arguments, environment={}).finish()
    for refused in (second, launched):
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert f"process {pids[0]} on {socket.gethostname()} works there since" in refused.stderr
    assert (run / "metrics.jsonl").read_bytes() == logged
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for owner in owners:
        owner.finish()
    after = training_runs.train(run, dataset, **{**fields, "nproc_per_node": 1})
    assert after.returncode == 0, after.stderr
    told = " ".join(after.stdout.split())
    assert f"process {pids[0]} on {socket.gethostname()}, ended abruptly" in told
    assert list(training_runs.losses(run)) == list(range(1, 11))
