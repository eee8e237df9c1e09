"""The commands of the suites under torchrun: two processes share the items out, and write what one does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.files import sha256_of_file
from tests import training_runs
from tests.loopback import served_at
from tests.suites_in_training import CORE8
from tests.tiny import ROOT
from tests.tiny_core_bundle import TASKS, write_bundle
from tests.tiny_student import write_student, write_vocabulary

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    assets = write_vocabulary(folder / "vocabulary", "Question: what is the red or green answer?", 384)
    return write_student(folder / "student", assets=assets, padded_vocab_size=384)


def by_processes(script: str, output: Path, *words: str) -> list[tuple[Any, list[Any], str]]:
    """Report, items and what was told, of one process and of two."""
    found = []
    for processes in ("1", "2"):
        report, told = command(script, output, processes, *words)
        lines = output.with_suffix(".items.jsonl").read_text().splitlines()
        found.append((report, [json.loads(line) for line in lines], told))
    return found


def command(script: str, output: Path, processes: str, *words: str) -> tuple[Any, str]:
    """The report, and what was told."""
    done = subprocess.run(
        [str(ROOT / "scripts" / "eval" / script), *words, "--output", str(output), "--overwrite"],
        env={**os.environ, **training_runs.ENVIRONMENT, "NPROC": processes},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["machine"]["processes"] == int(processes)
    return report, done.stdout


def test_two_processes_write_what_one_does(model: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", 7)
    words = [str(model), "--bundle", str(bundle), "--tasks", "all"]
    (one, items, told), (two, same, again) = by_processes("run_core8.sh", tmp_path / "r.json", *words)
    assert told.count("centered_mean") == again.count("centered_mean") == 1
    assert one["centered_mean"] == two["centered_mean"] and one["tasks"].keys() == TASKS.keys()
    assert {**one["tasks"]["colors"], "seconds": 0} == {**two["tasks"]["colors"], "seconds": 0}
    assert len(items) == len(same) == 7 * len(TASKS)
    for left, right in zip(items, same, strict=True):
        assert left.pop("log_likelihoods") == pytest.approx(right.pop("log_likelihoods"), abs=1e-5)
        assert left == right


def test_two_processes_fetch_the_bundle_once(model: Path, tmp_path: Path) -> None:
    """One fetches, the other waits for it; neither is refused because the other is at it."""
    (tmp_path / "served").mkdir()
    archive = shutil.make_archive(str(tmp_path / "served" / "b"), "zip", write_bundle(tmp_path / "bundle", 3))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with served_at(handler) as address:
        settings = CORE8.replace("http://localhost/bundle.zip", f"{address}/b.zip")
        settings = settings.replace("0" * 64, sha256_of_file(Path(archive)))
        found = []
        for number in "12":
            folder = tmp_path / f"data{number}"
            (tmp_path / "core8.toml").write_text(settings.replace("no_bundle_here", str(folder)))
            words = [str(model), "--config", str(tmp_path / "core8.toml")]
            found.append(command("run_core8.sh", tmp_path / f"{number}.json", number, *words)[0])
            assert (folder / "core.yaml").is_file()
    assert found[0]["centered_mean"] == found[1]["centered_mean"]


def test_two_processes_generate_what_one_does(model: Path, tmp_path: Path) -> None:
    words = [str(model), "--tasks", "copying,harmony,addition,pinned", "--max-new-tokens", "12", "--size", "smoke"]
    (one, items, _), (two, same, _) = by_processes("run_canaries.sh", tmp_path / "r.json", *words)
    assert items == same and len(items) == 16 + 64 + 8 + 16
    assert one["pinned"] == two["pinned"] and one["tasks"] == two["tasks"]
