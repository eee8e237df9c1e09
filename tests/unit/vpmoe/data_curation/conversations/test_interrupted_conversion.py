"""A conversion from the hub survives dropped connections and kills, and its shards are the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest_dataset import tree
from dropping_hub import Hub

from vpmoe.data_curation.conversations import store as conversations
from vpmoe.data_curation.conversations.convert import convert
from vpmoe.data_curation.conversations.synth import resolve_synth
from vpmoe.data_curation.reject_limit import RejectLimit
from vpmoe.data_curation.rows import hub as hub_rows
from vpmoe.data_curation.rows.source import RowSource
from vpmoe.errors import DataError, NotOursError
from vpmoe.harmony.prompts import Prompts

ROWS, FILES = 400, 4
SOURCE = RowSource((), "owner/rows", hub_id="owner/rows", revision="c0ffee")
NO_LIMIT = RejectLimit(None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    texts = ("query", "synthetic_reasoning", "synthetic_answer")
    rows = [{"synth_id": f"id{n}", "language": "en"} | {name: f"{name} {n}" for name in texts} for n in range(ROWS)]
    rows[137]["query"] = " "
    for number in range(FILES):
        pq.write_table(pa.Table.from_pylist(rows[number::FILES]), folder / f"{number}.parquet", row_group_size=30)
    return folder


@pytest.fixture(autouse=True)
def _small_parts_and_no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "ROW_GROUP_ROWS", 8)
    monkeypatch.setattr("vpmoe.data_curation.conversations.parts.ROW_GROUPS_PER_PART", 3)
    monkeypatch.setattr(hub_rows, "RETRY_SECONDS", (0,) * 5)
    monkeypatch.setattr(hub_rows, "_STATE_ROWS", 10)


def converted(output: Path, overwrite: bool = False) -> Path:
    convert(SOURCE, output, num_shards=3, prompts=Prompts(), limit=NO_LIMIT, overwrite=overwrite, quiet=True)
    return output


@pytest.fixture
def straight(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(datasets, "load_dataset_builder", Hub(files, 0).load_dataset_builder)
    found = made(converted(tmp_path / "straight"))
    assert sorted(found) == ["manifest.json", "rejects.jsonl", *(f"shard_{n:02d}.parquet" for n in range(3))]
    assert json.loads(found["manifest.json"])["rows"] == ROWS - 1
    return found


def made(folder: Path) -> dict[str, bytes]:
    """All that was converted; the receipt also tells when."""
    return {name: content for name, content in tree(folder).items() if name != "receipt.json"}


@pytest.mark.parametrize("seed", range(3))
def test_dropped_connections_change_nothing(
    files: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    hub = Hub(files, 0.03, seed)
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    assert made(converted(tmp_path / "dropped")) == straight
    assert hub.drops > 3


def test_a_conversion_that_gave_up_goes_on_where_it_stopped(
    files: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_rows, "RETRY_SECONDS", ())
    read, attempts = [], 0
    while not (tmp_path / "out").exists():
        hub = Hub(files, 0.006, attempts)
        monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
        attempts += 1
        try:
            converted(tmp_path / "out")
        except DataError as error:
            assert "goes on where it stopped" in str(error)
            read.append(rows_read(tmp_path / "out"))
    assert attempts > 2 and read == sorted(read) and read[-1] > 0
    assert made(tmp_path / "out") == straight


def test_an_unfinished_conversion_of_something_else_is_not_gone_on_with(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_rows, "RETRY_SECONDS", ())
    for seed in range(20):
        monkeypatch.setattr(datasets, "load_dataset_builder", Hub(files, 0.005, seed).load_dataset_builder)
        with suppress(DataError):
            converted(tmp_path / "out")
        if rows_read(tmp_path / "out"):
            break
    before = tree(tmp_path)
    assert rows_read(tmp_path / "out")
    with pytest.raises(NotOursError, match="num_shards: 3 -> 2"):
        convert(SOURCE, tmp_path / "out", num_shards=2, prompts=Prompts(), quiet=True)
    assert before.items() <= tree(tmp_path).items(), "without --overwrite it stays to be gone on with"


def rows_read(output: Path) -> int:
    """How far an unfinished conversion is safe."""
    path = output.with_name(f"{output.name}.partial") / "unfinished.json"
    results = json.loads(path.read_bytes())["results"] if path.exists() else {}
    return results.get("read", {}).get("rows_read", 0)


_CONVERT = """
import sys
from pathlib import Path
from vpmoe.data_curation.conversations import store as conversations
from vpmoe.data_curation.conversations import parts
from vpmoe.data_curation.conversations.convert import convert
from vpmoe.data_curation.conversations.synth import resolve_synth
from vpmoe.data_curation.reject_limit import RejectLimit
from vpmoe.harmony.prompts import Prompts
conversations.ROW_GROUP_ROWS, parts.ROW_GROUPS_PER_PART = 8, 3
source, output = resolve_synth(sys.argv[1]), Path(sys.argv[2])
convert(source, output, num_shards=3, prompts=Prompts(), limit=RejectLimit(None), quiet=True)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(files: Path, tmp_path: Path, repository: Path) -> None:
    convert(resolve_synth(str(files)), tmp_path / "whole", num_shards=3, prompts=Prompts(), limit=NO_LIMIT, quiet=True)
    output, draw, killed = tmp_path / "killed", random.Random(3), 0
    command = [sys.executable, "-c", _CONVERT, str(files), str(output)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    for _ in range(20):
        running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        while running.poll() is None and not (tmp_path / "killed.partial").exists():
            time.sleep(0.002)
        try:
            running.wait(draw.uniform(0, 0.1))
        except subprocess.TimeoutExpired:
            os.kill(running.pid, signal.SIGKILL)
            killed += 1
        _, shown = running.communicate()
        assert running.returncode in (0, -signal.SIGKILL), shown.decode()
        if running.returncode == 0:
            break
    assert killed
    if not output.exists():
        convert(resolve_synth(str(files)), output, num_shards=3, prompts=Prompts(), limit=NO_LIMIT, quiet=True)
    assert made(output) == made(tmp_path / "whole")
