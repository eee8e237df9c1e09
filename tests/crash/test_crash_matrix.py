"""Runs that are killed in every phase end as the run that was not; the whole matrix: ``scripts/crash_matrix.sh``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from megatron_vpmoe.files import json_bytes, list_files
from megatron_vpmoe.training.checkpoint_files import TRACKER
from tests.crash.journey import Broken, Journey
from tests.crash.matrix import Cell, Laboratory, cells
from tests.crash.phases import PHASES

pytestmark = pytest.mark.slow
BY_NAME = {phase.name: phase for phase in PHASES}
# In an order in which each kill finds the checkpoints that its phase is about.
ORDER = [
    "start-up: before the run is described",
    "tracker: the checkpoint stands, it does not say so",
    "start-up: before a checkpoint is read",
    "mid-step: between micro-batches",
    "data: within a file",
    "metadata: where tensors are",
    "metadata: the list of files",
    "tracker: written",
    "pruning: half removed",
    "asynchronous save under way",
    "evaluation",
    "samples",
    "end: before it is told",
]
SUBJECTS = {name.split(":")[0] for name in BY_NAME}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("crash"))


def test_the_order_has_every_phase() -> None:
    assert {name.split(":")[0] for name in ORDER} | {"sampling of a rollout"} == SUBJECTS
    assert {cell.phase for cell in cells(rounds=0, seed=0)} == set(PHASES)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_every_phase_in_turn_it_is_the_same_run(laboratory: Laboratory, processes: int) -> None:
    """Of two processes both are killed, or one alone, by turns; one bit of a checkpoint is changed on the way."""
    journey = laboratory.journey(f"of_{processes}", processes)
    for name, who in zip(ORDER, cycle(["all", "rank 1", "rank 0"]), strict=False):
        Cell(BY_NAME[name], processes, who).kill(journey)
        if name == "pruning: half removed":
            journey.spoil()
    journey.finish()


@pytest.mark.parametrize(("processes", "who"), [(1, "all"), (2, "rank 1")])
def test_killed_within_a_sampling_it_is_the_same_run(laboratory: Laboratory, processes: int, who: str) -> None:
    journey = laboratory.journey(f"sampled_{processes}", processes, sampled=True)
    Cell(BY_NAME["sampling of a rollout"], processes, who).kill(journey)
    journey.finish()


def test_killed_at_random_moments_it_is_the_same_run(laboratory: Laboratory) -> None:
    journey = laboratory.journey("at_random", 2)
    for cell in cells(rounds=2, seed=1)[-2:]:
        Cell(None, 2, cell.who, cell.seed).kill(journey)
    journey.finish()


def _other_value(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[7] = lines[7].replace('"value": ', '"value": 1')
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _twice(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, lines[7]]) + "\n")


def _other_weights(run: Path) -> None:
    """A sound checkpoint, of another run."""
    path = run / "checkpoints" / "iter_0000010"
    with (path / "common.pt").open("ab") as stream:
        stream.write(b"x")
    (path / "files.json").write_bytes(json_bytes(list_files(path, leave_out=["files.json"])))


WRONGS: dict[str, Callable[[Path], object]] = {
    "is 1": _other_value,
    "logged twice": _twice,
    "common.pt": _other_weights,
    "borne by what is none": lambda run: (run / "checkpoints" / "iter_0000010" / "common.pt").unlink(),
    "step 10 is lost": lambda run: shutil.rmtree(run / "checkpoints" / "iter_0000010"),
    "notes.txt": lambda run: (run / "notes.txt").unlink(),
    "the tracker names 12": lambda run: (run / "checkpoints" / TRACKER).write_text("12\n"),
}


@pytest.mark.parametrize("said", WRONGS)
def test_what_is_wrong_is_found(laboratory: Laboratory, tmp_path: Path, said: str) -> None:
    """By the checks themselves, in a finished run that is changed afterwards."""
    of_one = laboratory.journey(f"sound {said}", 1)
    finished = Journey(tmp_path, of_one.straight, of_one.dataset, 1, of_one.fields, begun=of_one.straight)
    finished.check()
    with (finished.run_dir / "metrics.jsonl").open(), pytest.raises(Broken, match="processes are left"):
        finished.check()
    WRONGS[said](finished.run_dir)
    with pytest.raises(Broken, match=said):
        finished.check()
