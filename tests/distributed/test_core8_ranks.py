"""The commands of the suites under torchrun: two processes share the items out, and write what one does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import training_runs
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
        lines = output.with_suffix(".items.jsonl").read_text().splitlines()
        found.append((report, [json.loads(line) for line in lines], done.stdout))
    return found


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


def test_two_processes_generate_what_one_does(model: Path, tmp_path: Path) -> None:
    words = [str(model), "--tasks", "copying,harmony,addition,pinned", "--max-new-tokens", "12", "--size", "smoke"]
    (one, items, _), (two, same, _) = by_processes("run_canaries.sh", tmp_path / "r.json", *words)
    assert items == same and len(items) == 16 + 64 + 8 + 16
    assert one["pinned"] == two["pinned"] and one["tasks"] == two["tasks"]
