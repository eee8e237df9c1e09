"""Processes inside an ordinary test, each forked from one that has imported torch and Megatron-Core already."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.launch.workers import Nodes

_FORKS = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Begin to import; before the product, for its crews, starts the one that there can be."""
    _FORKS.set_forkserver_preload(["tests.preloaded"])
    forkserver.ensure_running()


class Started:
    """``target(*arguments)`` in a process of its own, which ends with what it returns as exit code (None is 0).

    Args:
        target: a module-level function.
        environment: variables to set beside those of this process.
        folder: where it runs, if not here.
    """

    def __init__(
        self, target: Callable[..., Any], *arguments: Any, environment: Mapping[str, str], folder: Path | None = None
    ) -> None:
        self.target = target
        with tempfile.NamedTemporaryFile(delete=False) as out, tempfile.NamedTemporaryFile(delete=False) as err:
            self._said = (out.name, err.name)
        given = (self._said, str(folder or Path.cwd()), {**os.environ, **environment}, target, arguments)
        self.process = _FORKS.Process(target=_enter, args=given, daemon=True)
        self.process.start()

    def errors(self) -> str:
        """Its standard error so far."""
        return Path(self._said[1]).read_text(errors="replace")

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end; what it wrote is in the result, and its standard error in this process's too."""
        self.process.join(timeout)
        late = self.process.exitcode is None
        if late:
            self.process.kill()
            self.process.join()
        out, err = (Path(path).read_text(errors="replace") for path in self._said)
        for path in self._said:
            os.unlink(path)
        sys.stderr.write(err)
        assert not late, f"{self.target.__name__} was not done after {timeout} s:\n{out}"
        return subprocess.CompletedProcess(self.target.__name__, self.process.exitcode or 0, out, err)


def _enter(said: tuple[str, str], folder: str, environment: dict[str, str], target: Callable, arguments: tuple) -> None:
    # Ends with the one that started it, and may have processes of its own all the same, as upstream's checkpoints do.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    assert "tests.preloaded" in sys.modules, "the process that is forked could not import tests.preloaded"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    torch.set_num_threads(1)
    sys.exit(target(*arguments))


def run_workers(world_size: int, target: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """Call ``target(*arguments)`` in ``world_size`` processes described as torchrun would; returns each one's result.

    Args:
        target: a module-level function; what it returns must be savable by torch.save.
        folder: for the results.
    """
    results = [folder / f"result_{rank}.pt" for rank in range(world_size)]
    workers = [
        Started(_work, path, target, arguments, environment=environment)
        for path, environment in zip(results, described_ranks(world_size), strict=True)
    ]
    running, deadline = {worker.process.sentinel: worker for worker in workers}, time.monotonic() + 300
    while running:
        ended = [running.pop(sentinel) for sentinel in wait(list(running), deadline - time.monotonic())]
        if not ended or any(worker.process.exitcode for worker in ended):
            for worker in running.values():  # they would wait for it
                worker.process.kill()
            break
    codes = [worker.finish().returncode for worker in workers]
    assert codes == [0] * world_size, f"{target.__name__} ended with {codes}, a rank each"
    return [torch.load(path, weights_only=False) for path in results]


def described_ranks(world_size: int) -> list[dict[str, str]]:
    """The environment of each of ``world_size`` processes that are to meet, as torchrun would describe them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _work(result: Path, target: Callable[..., Any], arguments: tuple) -> None:
    torch.save(target(*arguments), result)


def as_programs(*programs: Sequence[str]) -> None:
    """What ``python -m`` does with the words of each, one after the other in this process."""
    for words in programs:
        sys.argv = [*words]
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


@contextmanager
def forked_commands() -> Iterator[None]:
    """Commands that the product starts are forked too; the one worker of a training is its launcher's own process.

    That commands are processes, and how launcher and workers find each other, is held where that is tested.
    """
    with mock.patch("vpmoe.commands.subprocess", SimpleNamespace(Popen=_Command)):
        yield


class _Command:
    """In the place of a ``subprocess.Popen`` of the words ``python -m module ...``; is told what that is told."""

    def __init__(self, words: Sequence[str], *, cwd: Path, stdout: int | None, **_: object) -> None:
        assert words[:2] == [sys.executable, "-m"], words
        self._started = Started(_as_command, *words[2:], environment={}, folder=cwd)
        self._stdout = sys.stdout if stdout is None else sys.stderr

    def send_signal(self, number: int) -> None:
        os.kill(self._started.process.pid or 0, number)

    def wait(self) -> int:
        done = self._started.finish(timeout=600)
        self._stdout.write(done.stdout)
        return done.returncode


def _as_command(*words: str) -> None:
    from megatron_vpmoe.launch import workers

    workers.run_workers = _train_here
    as_programs(words)


def _train_here(cfg: RunConfig, nodes: Nodes, module: str, arguments: list[str], *, debug: bool = False) -> int:
    assert cfg.parallel.nproc_per_node == nodes.count == 1
    return importlib.import_module(module).main(arguments)
