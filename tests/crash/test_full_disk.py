"""A disk that is full, or out of inodes, in the middle of a run: what was saved stands, and with room it goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vpmoe.training.checkpoint_files import iteration_of
from tests.crash.matrix import Laboratory

pytestmark = pytest.mark.slow
ROOM = "size=64m,nr_inodes=10000"


class Disk:
    """A small file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ROOM, "vpmoe-test", str(folder)], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")

    def limit(self, options: str) -> None:
        """Have so much room from now on."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    subprocess.run(["umount", "--lazy", str(made.folder)], check=True)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("full_disk"))


def _size(folder: Path) -> int:
    """Of what lies below it, in a file system of pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def _inodes(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*"))


def room_for(straight: Path, checkpoints: float, of: str) -> str:
    """The room that a run like ``straight`` takes with so many checkpoints, as an option of mount."""
    takes, one = {"size": _size, "nr_inodes": _inodes}[of], straight / "checkpoints" / "iter_0000002"
    saved = straight / "checkpoints"
    return f"{of}={int(takes(straight) - takes(saved) + checkpoints * (takes(one) + (of == 'nr_inodes')) + 8)}"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("of", "beside"), [("size", True), ("nr_inodes", False)])
def test_a_save_that_finds_no_room_ends_the_run_and_costs_nothing_that_was_saved(
    laboratory: Laboratory, disk: Disk, processes: int, of: str, beside: bool
) -> None:
    """Room for two checkpoints and half of a third."""
    journey = laboratory.journey(f"of_{processes}", processes, folder=disk.folder / "journey")
    disk.limit(room_for(journey.straight, 2.5, of))
    for said in journey.fail(async_save=beside, keep_last=9):
        assert "exit code 2" in said and said.count("No space left on device") == 1 and "Traceback" not in said
        assert str(journey.run_dir) in said
    assert journey.newest is not None and iteration_of(journey.newest) == 4
    assert [path.name for path in (journey.run_dir / "checkpoints").glob("iter_*.partial")] == ["iter_0000001.partial"]
    disk.limit(ROOM)
    journey.finish()


def test_metrics_that_find_no_room_end_every_rank(laboratory: Laboratory, disk: Disk) -> None:
    """Rank 0 alone writes them: the other one must not wait for it."""
    journey = laboratory.journey("metrics", 2, folder=disk.folder / "journey")
    logged = (journey.straight / "metrics.jsonl").stat().st_size
    others = _size(journey.straight) - _size(journey.straight / "checkpoints") - logged
    disk.limit(f"size={others + logged // 2}")
    first, second = journey.fail(save_interval=100)
    assert "exit code 2" in first and first.count("No space left on device") == 1 and "Traceback" not in first
    assert "metrics.jsonl" in first and "exit code 0" not in second
    disk.limit(ROOM)
    journey.finish()
