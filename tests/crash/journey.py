"""A run that is killed, and killed again, held against one that was not: what has to be true after each kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_vpmoe.files import read_json
from megatron_vpmoe.training.checkpoint_files import TRACKER, Found, find_newest, iteration_of
from tests import training_runs
from tests.crash.points import Point, stopping_at
from tests.workers import Started, described_ranks

_OF_THE_CLOCK = re.compile("throughput/|ms/|memory/|.*/seconds")
_OWN = (".metadata", "run_state.json")
"""Files of a checkpoint that name a folder, a moment or a configuration: no two runs have the same."""
_SECONDS_TO_A_POINT, _SECONDS_TO_END = 180, 60


class Broken(AssertionError):
    """Something does not hold; says what."""


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


def _check_same(ours: Mapping[Any, Any], theirs: Mapping[Any, Any], what: str) -> None:
    keys = (key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key))
    for key in keys:
        raise Broken(f"{what} differ from the straight run's: {key} is {ours.get(key)} and not {theirs.get(key)}")


@dataclass
class Journey:
    """A run in ``folder/run`` that is to become the one in ``straight``.

    Args:
        folder: empty.
        straight: the run directory of the same run, finished without a kill, with all its checkpoints.
        dataset: of both.
        processes: of the run.
        fields: of its configuration.
        begun: a run directory to go on from a copy of.
    """

    folder: Path
    straight: Path
    dataset: Path
    processes: int
    fields: Mapping[str, Any]
    begun: Path | None = None
    newest: Path | None = None
    _users: dict[Path, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.begun is not None:
            shutil.copytree(self.begun, self.run_dir)
        for path in ("notes.txt", "checkpoints/iter_0000001.partial/mine.txt", "checkpoints/old.damaged/model.bin"):
            self._give(self.run_dir / path)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def _give(self, path: Path) -> None:
        """A file of the user's."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._users[path] = f"the user's, {len(self._users)}".encode()
        path.write_bytes(self._users[path])

    def kill(
        self, points: Sequence[Point], *, of: int, victims: Sequence[int], or_end: bool = False, **changes: Any
    ) -> None:
        """Go on with the run and kill ``victims`` at the instant that rank ``of`` comes to ``points``.

        Args:
            points: how the instant is found.
            of: the rank that looks for it.
            victims: ranks.
            or_end: that it ends before is well too.
            changes: of the configuration's fields.
        """
        here = self.folder / "here"
        here.unlink(missing_ok=True)
        workers = self._start({of: points}, **changes)

        def there() -> bool:
            return here.exists() and _is_stopped(workers[of])

        def done() -> bool:
            return or_end and all(worker.process.exitcode == 0 for worker in workers)

        self._until(lambda: there() or done(), workers, _SECONDS_TO_A_POINT, "came to no such point")
        self._kill(workers, victims, stopped=of)

    def kill_after(self, seconds: float, *, victims: Sequence[int]) -> None:
        """Go on with the run and kill ``victims`` after a time, unless it is done by then."""
        workers, end = self._start({}), time.monotonic() + seconds
        while time.monotonic() < end and all(worker.process.is_alive() for worker in workers):
            time.sleep(0.002)
        self._kill(workers, victims)

    def finish(self) -> None:
        """Go on to the end, which is that of the straight run."""
        workers = self._start({})
        self._until(lambda: all(worker.process.exitcode == 0 for worker in workers), workers, 300, "cannot go on")
        for worker in workers:
            worker.finish()
        self.check()
        last = _checkpoints(self.straight)[-1].name
        _check(self.newest is not None and self.newest.name == last, f"the last checkpoint is {self.newest}")
        ours, theirs = (_records(run) for run in (self.run_dir, self.straight))
        _check_same(ours, theirs, "metrics")
        for log in ("samples.jsonl", "expert_loads.bin"):
            ours, theirs = (
                path.read_bytes() if path.exists() else b"" for path in (self.run_dir / log, self.straight / log)
            )
            _check(ours == theirs, f"{log} is not the straight run's")
        left = [path.name for path in self.run_dir.rglob(".*.tmp")]
        _check(not left, f"half-written files are left: {left}")

    def spoil(self) -> None:
        """Change one bit of the newest checkpoint: the run has to go on from the one before."""
        assert self.newest is not None
        file = max(self.newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        self._users = {path: kept for path, kept in self._users.items() if self.newest not in path.parents}
        self._users[self.newest.with_name(f"{self.newest.name}.damaged") / file.name] = bytes(content)
        self.newest = max((path for path in _checkpoints(self.run_dir) if path != self.newest), default=None)

    def fail(self, **changes: Any) -> list[str]:
        """Go on with the run, which is to end of an error; what each rank says of it."""
        ends = self._ended(self._start({}, **changes), "have not ended")
        _check(all(end.returncode for end in ends), "the run ended well")
        return [f"exit code {end.returncode}: {end.stderr}" for end in ends]

    def check(self) -> None:
        """What has to hold after any kill.

        Raises:
            Broken: it does not.
        """
        users = _open_below(self.run_dir)
        _check(not users, f"processes are left: {users}")
        for path, content in self._users.items():
            _check(path.is_file() and path.read_bytes() == content, f"the user's {path} is gone or changed")
        found, damaged = find_newest(self.run_dir / "checkpoints")
        _check(not damaged, f"a checkpoint's name is borne by what is none: {[str(line) for line in damaged]}")
        before = iteration_of(self.newest) if self.newest else 0
        _check((found.iteration if found else 0) >= before, f"the checkpoint of step {before} is lost")
        if found is None:
            return
        self._compare(found)
        tracker = self.run_dir / "checkpoints" / TRACKER
        stated = int(tracker.read_text()) if tracker.exists() else 0
        _check(stated <= found.iteration, f"the tracker names {stated}, the newest is {found.path.name}")
        self.newest = found.path

    def _compare(self, found: Found) -> None:
        straight = self.straight / "checkpoints" / found.path.name
        ours, theirs = (
            {name: entry["sha256"] for name, entry in read_json(path / "files.json").items() if name not in _OWN}
            for path in (found.path, straight)
        )
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        _check(not different, f"{found.path.name} is not that of the straight run: {different}")
        state = read_json(straight / "run_state.json")
        for name in ("consumed_samples", "data", "skipped_steps", "objective", "world_size"):
            _check(found.state[name] == state[name], f"{name} of {found.path.name} is not that of the straight run")
        ours, theirs = (
            {key: value for key, value in _records(run).items() if key[0] <= found.iteration}
            for run in (self.run_dir, self.straight)
        )
        _check_same(ours, theirs, f"metrics up to {found.path.name}")

    def arguments(self, **changes: Any) -> list[str]:
        """What a process of the run is given."""
        fields = {**self.fields, "nproc_per_node": self.processes, "resume": True, **changes}
        return training_runs.command(self.run_dir, self.dataset, **fields)[3:]

    def _start(self, points: Mapping[int, Sequence[Point]], **changes: Any) -> list[Started]:
        arguments = self.arguments(**changes)
        return [
            Started(stopping_at, arguments, points.get(rank, ()), str(self.folder / "here"), environment=environment)
            for rank, environment in enumerate(described_ranks(self.processes))
        ]

    def _kill(self, workers: Sequence[Started], victims: Sequence[int], *, stopped: int | None = None) -> None:
        for rank in victims:
            if (pid := workers[rank].process.pid) is not None and workers[rank].process.is_alive():
                os.kill(pid, signal.SIGKILL)
        if stopped is not None and stopped not in victims and workers[stopped].process.is_alive():
            os.kill(workers[stopped].process.pid or 0, signal.SIGCONT)
        if not self._have_met(workers):  # there they wait for each other, and the launcher ends who is left
            for worker in workers:
                worker.process.kill()
        was_first = self.newest is None
        self._ended(workers, f"waited on for ranks {[*victims]}, which were killed")
        if was_first and self.newest is not None:  # an export, say: what holds one is not pruned
            self._give(self.newest / "hf" / "model.safetensors")

    def _have_met(self, workers: Sequence[Started]) -> bool:
        """Whether the processes form a group: the first thing that they do together is to take the directory."""
        lock = self.run_dir / ".lock"
        if not lock.exists():
            return False
        owner = lock.read_text()
        return not owner or f'"pid": {workers[0].process.pid},' in owner

    def _ended(self, workers: Sequence[Started], what: str) -> list[subprocess.CompletedProcess[str]]:
        """How each worker ends, after which everything holds; ``what`` is wrong where one does not within the time."""
        deadline = time.monotonic() + _SECONDS_TO_END
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        waiting = [rank for rank, worker in enumerate(workers) if worker.process.is_alive()]
        for worker in workers:
            worker.process.kill()
        ends = [worker.finish() for worker in workers]
        _check(not waiting, f"the ranks {waiting} of the run {what} after {_SECONDS_TO_END} s")
        self.check()
        return ends

    def _until(self, reached: Callable[[], bool], workers: Sequence[Started], seconds: float, what: str) -> None:
        """Wait; ``what`` is wrong if it takes longer, or a worker ends with a failure before."""
        deadline = time.monotonic() + seconds
        while not reached():
            over = time.monotonic() > deadline or not any(worker.process.is_alive() for worker in workers)
            if (over and not reached()) or any(worker.process.exitcode for worker in workers):
                for worker in workers:
                    worker.process.kill()
                ends = [worker.finish() for worker in workers]
                said = "\n".join(
                    f"exit code {end.returncode}\n{end.stdout[-2000:]}{end.stderr[-4000:]}" for end in ends
                )
                raise Broken(f"the run {what}:\n{said}")
            time.sleep(0.005)


def straight_run(folder: Path, dataset: Path, processes: int, fields: Mapping[str, Any]) -> Path:
    """The run without a kill, with all its checkpoints; its directory."""
    kept = {**fields, "keep_last": 1000}
    training_runs.train_in_workers(processes, folder / "run", dataset, **kept)
    return folder / "run"


def _is_stopped(worker: Started) -> bool:
    try:
        return psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("iter_???????"))


def _records(run_dir: Path) -> dict[tuple[int, str], float]:
    """Metrics but for those of the clock, each of which is there once."""
    found: dict[tuple[int, str], float] = {}
    for record in training_runs.records(run_dir):
        key = record["step"], record["tag"]
        _check(key not in found, f"{record['tag']} of step {record['step']} is logged twice")
        found[key] = record["value"]
    return {key: value for key, value in found.items() if not _OF_THE_CLOCK.match(key[1])}


def _open_below(folder: Path) -> list[str]:
    """Processes with a file of a folder open."""
    found = []
    for process in psutil.process_iter():
        try:
            names = [os.readlink(link.path) for link in os.scandir(f"/proc/{process.pid}/fd")]
        except OSError:  # ended meanwhile, or another user's
            continue
        if any(name.startswith(f"{folder}/") for name in names):
            found.append(f"{process.pid} {' '.join(process.cmdline())}")
    return found
