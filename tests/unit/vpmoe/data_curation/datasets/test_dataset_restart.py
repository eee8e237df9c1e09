"""A build that is run again, was stopped, or was killed ends with the same dataset as one that ran through."""

import errno
import json
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

from megatron_vpmoe.token_files import TripleWriter
from vpmoe.data_curation.checks.verify import verify
from vpmoe.data_curation.datasets import build as pipeline
from vpmoe.data_curation.datasets.kd import build
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.errors import DataError, NotOursError


def test_a_finished_build_is_left_alone_and_another_is_refused(
    conversations_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset_dir, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*.bin")}
    build(conversations_dir, tmp_path / "copy", OPTIONS, quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*.bin")}
    other = BuildOptions(seq_len=120, valid_fraction=0.05, compact_vocab_size=512)
    with pytest.raises(NotOursError, match=r"config.seq_len: 160 -> 120"):
        build(conversations_dir, tmp_path / "copy", other, quiet=True)
    manifest = build(conversations_dir, tmp_path / "copy", other, overwrite=True, quiet=True)
    assert manifest["seq_length"] == 120 and verify(tmp_path / "copy") == []


def test_an_interrupted_build_goes_on_after_its_last_shard(
    conversations_dir: Path, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pipeline.ShardWriter.close

    def stop_at_third(self: pipeline.ShardWriter) -> dict:
        if self.name == "shard_02":
            raise KeyboardInterrupt
        return original(self)

    output, partial = tmp_path / "dataset", tmp_path / "dataset.partial"
    monkeypatch.setattr(pipeline.ShardWriter, "close", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build(conversations_dir, output, OPTIONS, quiet=True)
    monkeypatch.undo()
    assert not output.exists()
    done = {path.name: path.stat().st_mtime_ns for path in (partial / "train").iterdir() if "shard_02" not in path.name}
    assert {name[:8] for name in done} == {"shard_00", "shard_01"}
    with pytest.raises(NotOursError, match=r"unfinished work lies here.*config.seq_len: 160 -> 64"):
        build(conversations_dir, output, BuildOptions(seq_len=64), quiet=True)
    build(conversations_dir, output, OPTIONS, quiet=True)
    for name, when in done.items():
        assert (output / "train" / name).stat().st_mtime_ns == when, "finished shards were not built again"
    assert tree(output) == tree(dataset_dir)


def test_a_finished_shard_that_changed_stops_the_restart(
    conversations_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(conversations_dir, tmp_path / "dataset", OPTIONS, quiet=True)
    monkeypatch.undo()
    path = tmp_path / "dataset.partial" / "train" / "shard_01_tokens.bin"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\1\1\1")
    with pytest.raises(DataError, match=r"shard_01_tokens\.bin"):
        build(conversations_dir, tmp_path / "dataset", OPTIONS, quiet=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_build_did_not_make_stays(conversations_dir: Path, tmp_path: Path, overwrite: bool) -> None:
    """``--output-dir data``: folders of the names that a dataset has, without the proof that a build made them."""
    files = [
        f"data/{name}" for name in ("train/notes.txt", "valid/x.bin", "tokenizer/o200k_base.tiktoken", "rows.parquet")
    ]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(NotOursError, match=r"no receipt\.json"):
        build(conversations_dir, tmp_path / "data", OPTIONS, overwrite=overwrite, quiet=True)
    assert all((tmp_path / name).read_text() == "mine" for name in files)


def test_input_and_output_lie_apart(conversations_dir: Path, dataset_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(conversations_dir, tmp_path / "conversations"))
    before = tree(copy)
    for output in (copy, copy / "dataset", tmp_path):
        with pytest.raises(DataError, match="input and output lie in one another"):
            build(copy, output, OPTIONS, overwrite=True, quiet=True)
    assert tree(copy) == before
    own = Path(shutil.copytree(dataset_dir, tmp_path / "dataset"))
    other = BuildOptions(seq_len=120, compact_map=own / "compact_vocab.npy")
    with pytest.raises(DataError, match="input and output lie in one another"):
        build(conversations_dir, own, other, overwrite=True, quiet=True)
    assert tree(own) == tree(dataset_dir)


def test_a_full_disk_leaves_finished_shards_and_names_the_missing(
    conversations_dir: Path, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, output = TripleWriter.add, tmp_path / "dataset"

    def full_at_third(self: TripleWriter, *arrays: np.ndarray) -> None:
        if "shard_02" in str(self._prefix):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._prefix))
        original(self, *arrays)

    monkeypatch.setattr(TripleWriter, "add", full_at_third)
    with pytest.raises(DataError, match="No space left on device") as caught:
        build(conversations_dir, output, OPTIONS, quiet=True)
    assert "finished and safe: shard_00, shard_01; missing: shard_02, shard_03, shard_04" in str(caught.value)
    monkeypatch.undo()
    assert not output.exists()
    for split in ("train", "valid"):
        for path in (tmp_path / "dataset.partial" / split).glob("shard_0[01]*"):
            assert path.read_bytes() == (dataset_dir / split / path.name).read_bytes()
    build(conversations_dir, output, OPTIONS, quiet=True)
    assert tree(output) == tree(dataset_dir)


def test_a_folder_that_cannot_be_made_is_a_typed_error(conversations_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="this is no folder, so nothing can be made below it"):
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
    places = [str(repository), str(repository / "Megatron-vpmoe"), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(script), str(conversations_dir), str(output), str(workers)]
    draw, killed = random.Random(workers), 0
    for _ in range(30):
        started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
        # The clock runs from the first sign of work; a build of these rows takes about a second from there.
        while started.poll() is None and not output.with_name("dataset.partial").exists():
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
        assert not output.exists() or verify(output) == []
    assert killed, "no build was killed"
    build(conversations_dir, output, OPTIONS, workers=workers, quiet=True)
    assert tree(output) == tree(dataset_dir)


_KILLED_AT_SECOND_SHARD = """
import multiprocessing, os, signal, sys
from pathlib import Path
from vpmoe.data_curation.datasets import kd as build
from vpmoe import progress
from conftest_dataset import OPTIONS

seen = []
class Killer(progress.Progress):
    def add(self, rows, tokens):
        super().add(rows, tokens)
        if self.phase == "building" and list(Path(sys.argv[2] + ".partial").glob("scratch/shard_01*")):
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

build.Progress = Killer
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
    places = [str(repository), str(repository / "Megatron-vpmoe"), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(script), str(conversations_dir), str(output), str(workers)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    assert 0 < len(json.loads((tmp_path / "dataset.partial" / "unfinished.json").read_text())["results"]) < 5
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
