"""A build that is run again, was stopped, or was killed ends with the same dataset as one that ran through."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest_dataset import OPTIONS, tree

from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.datasets import kd_parts as build_parts
from vpmoe.data_curation.datasets.kd import build
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.token_files import TripleWriter
from vpmoe.errors import DataError


def test_a_finished_build_is_left_alone_and_another_is_refused(
    conversations_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset_dir, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*.bin")}
    build(conversations_dir, tmp_path / "copy", OPTIONS, quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*.bin")}
    other = BuildOptions(seq_len=120, valid_fraction=0.05, compact_vocab_size=512)
    with pytest.raises(DataError, match="another config_hash"):
        build(conversations_dir, tmp_path / "copy", other, quiet=True)
    manifest = build(conversations_dir, tmp_path / "copy", other, overwrite=True, quiet=True)
    assert manifest["seq_length"] == 120 and verify(tmp_path / "copy") == []


def test_an_interrupted_build_goes_on_after_its_last_shard(
    conversations_dir: Path, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = build_parts.PartBuilder.finish_shard

    def stop_at_third(self: build_parts.PartBuilder, shard: int, stats: object) -> dict:
        if shard == 2:
            raise KeyboardInterrupt
        return original(self, shard, stats)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(build_parts.PartBuilder, "finish_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build(conversations_dir, tmp_path, OPTIONS, quiet=True)
    monkeypatch.undo()
    assert not (tmp_path / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    assert {path.name[:8] for path in done} == {"shard_00", "shard_01"}
    with pytest.raises(DataError, match="unfinished build of other options"):
        build(conversations_dir, tmp_path, BuildOptions(seq_len=64), quiet=True)
    build(conversations_dir, tmp_path, OPTIONS, quiet=True)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "finished shards were not built again"
    assert tree(tmp_path) == tree(dataset_dir)


def test_a_finished_shard_that_changed_stops_the_restart(
    conversations_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vpmoe.data_curation.datasets.folder.write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        build(conversations_dir, tmp_path, OPTIONS, quiet=True)
    monkeypatch.undo()
    path = tmp_path / "train" / "shard_01_tokens.bin"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\1\1\1")
    with pytest.raises(DataError, match=r"shard_01_tokens\.bin"):
        build(conversations_dir, tmp_path, OPTIONS, quiet=True)


def test_a_full_disk_leaves_finished_shards_and_names_the_missing(
    conversations_dir: Path, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TripleWriter.add

    def full_at_third(self: TripleWriter, *arrays: np.ndarray) -> None:
        if "shard_02" in str(self._prefix):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._prefix))
        original(self, *arrays)

    monkeypatch.setattr(TripleWriter, "add", full_at_third)
    with pytest.raises(DataError, match="No space left on device") as caught:
        build(conversations_dir, tmp_path, OPTIONS, quiet=True)
    assert "finished and safe: shard_00, shard_01; missing: shard_02, shard_03, shard_04" in str(caught.value)
    monkeypatch.undo()
    assert not (tmp_path / "manifest.json").exists()
    for split in ("train", "valid"):
        for path in (tmp_path / split).glob("*"):
            assert path.read_bytes() == (dataset_dir / split / path.name).read_bytes()
    build(conversations_dir, tmp_path, OPTIONS, quiet=True)
    assert tree(tmp_path) == tree(dataset_dir)


def test_a_folder_that_cannot_be_made_is_a_typed_error(conversations_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="missing: shard_00, shard_01"):
        build(conversations_dir, tmp_path / "file" / "dataset", OPTIONS, quiet=True)


_BUILD = """
import sys
from pathlib import Path
from vpmoe.data_curation.datasets.kd import build
from conftest_dataset import OPTIONS
if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), OPTIONS, workers=int(sys.argv[3]), quiet=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_random_moments_gives_the_same_dataset(
    conversations_dir: Path, dataset_dir: Path, tmp_path: Path, repository: Path, workers: int
) -> None:
    script, output = tmp_path / "script.py", tmp_path / "dataset"
    script.write_text(_BUILD)
    places = [str(repository), str(repository / "Megatron-vpmoe"), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(script), str(conversations_dir), str(output), str(workers)]
    draw, killed = random.Random(workers), 0
    for _ in range(30):
        started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
        # The clock runs from the first sign of work; a build of these rows takes about a second from there.
        while started.poll() is None and not (output / ".build").exists():
            time.sleep(0.005)
        try:
            started.wait(draw.uniform(0.0, 0.8))
        except subprocess.TimeoutExpired:
            os.kill(started.pid, signal.SIGKILL)
            killed += 1
        _, shown = started.communicate()
        assert started.returncode in (0, -signal.SIGKILL), shown.decode()
        if started.returncode == 0:
            break
        assert not (output / "manifest.json").exists() or verify(output) == []
    assert killed, "no build was killed"
    build(conversations_dir, output, OPTIONS, workers=workers, quiet=True)
    assert tree(output) == tree(dataset_dir)


_KILLED_AT_SECOND_SHARD = """
import multiprocessing, os, signal, sys
from pathlib import Path
from vpmoe.data_curation.datasets import kd as build
from vpmoe.data_curation import progress
from conftest_dataset import OPTIONS

seen = []
class Killer(progress.RowProgress):
    def add(self, rows, tokens):
        super().add(rows, tokens)
        if self.phase == "building" and list((Path(sys.argv[2]) / ".build").glob("shard_*.json")):
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

build.RowProgress = Killer
if __name__ == "__main__":
    build.build(Path(sys.argv[1]), Path(sys.argv[2]), OPTIONS, workers=int(sys.argv[3]), quiet=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_then_the_same_command_gives_the_same_dataset(
    conversations_dir: Path, dataset_dir: Path, tmp_path: Path, repository: Path, workers: int
) -> None:
    script, output = tmp_path / "killed.py", tmp_path / "dataset"
    script.write_text(_KILLED_AT_SECOND_SHARD)
    places = [str(repository), str(repository / "Megatron-vpmoe"), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(script), str(conversations_dir), str(output), str(workers)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (output / "manifest.json").exists()
    receipts = sorted(path.name for path in (output / ".build").glob("shard_*.json"))
    assert 0 < len(receipts) < 5
    pids = [int(pid) for pid in killed.stdout.split()]
    assert len(pids) == (workers if workers > 1 else 0)
    assert _all_gone(pids), "workers outlived the builder"
    build(conversations_dir, output, OPTIONS, workers=workers, quiet=True)
    assert tree(output) == tree(dataset_dir)


def _all_gone(pids: list[int]) -> bool:
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False
