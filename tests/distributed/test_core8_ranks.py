"""The command under torchrun: two processes share the items out, and write what one does."""

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


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    assets = write_vocabulary(tmp_path / "vocabulary", "Question: what is the red or green answer?", 384)
    model = write_student(tmp_path / "student", assets=assets, padded_vocab_size=384)
    bundle = write_bundle(tmp_path / "bundle", 7)
    found: list[Any] = []
    for processes in ("1", "2"):
        output = tmp_path / f"{processes}.json"
        words = [str(model), "--bundle", str(bundle), "--tasks", ",".join(TASKS), "--output", str(output)]
        done = subprocess.run(
            [str(ROOT / "scripts" / "eval" / "run_core8.sh"), *words],
            env={**os.environ, **training_runs.ENVIRONMENT, "NPROC": processes},
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("centered_mean") == 1
        report = json.loads(output.read_text())
        assert report["machine"]["processes"] == int(processes)
        items = [json.loads(line) for line in output.with_suffix(".items.jsonl").read_text().splitlines()]
        found.append((report, items))
    (one, items), (two, same) = found
    assert one["centered_mean"] == two["centered_mean"]
    assert {**one["tasks"]["colors"], "seconds": 0} == {**two["tasks"]["colors"], "seconds": 0}
    assert len(items) == len(same) == 7 * len(TASKS)
    for left, right in zip(items, same, strict=True):
        assert left.pop("log_likelihoods") == pytest.approx(right.pop("log_likelihoods"), abs=1e-5)
        assert left == right
