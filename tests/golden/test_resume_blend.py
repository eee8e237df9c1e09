"""A run on a blend with a schedule of weights, killed and resumed, is the run that was not; its shares are exact."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests import training_runs
from tests.fixtures_dataset import small_dataset

pytestmark = pytest.mark.slow
LAST = 20


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("data")
    sizes = {"sums": 60, "facts": 200}
    listed = ", ".join(f"{{path: {small_dataset(folder / name, train=sizes[name])}, weight: 1}}" for name in sizes)
    schedule = "[{from_sample: 30, weights: [1, 3]}]"
    return {"data_path": None, "blend": f"[{listed}]", "blend_schedule": schedule, "eval_interval": 10}


def values(run_dir: Path, tag: str) -> dict[int, float]:
    return {record["step"]: record["value"] for record in training_runs.records(run_dir) if record["tag"] == tag}


def test_killed_and_resumed(tmp_path: Path, blend: dict[str, object]) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    done = training_runs.train(straight, tmp_path, **blend)
    assert done.returncode == 0, done.stdout + done.stderr
    assert training_runs.train_until(12, signal.SIGKILL, resumed, tmp_path, **blend) == -signal.SIGKILL
    done = training_runs.train(resumed, tmp_path, resume=True, **blend)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "packing the rows behind the cursor again" not in done.stdout
    assert training_runs.losses(resumed) == training_runs.losses(straight)
    # 4 rows a step: 30 at 1:1, then 50 at 1:3.
    assert values(resumed, "data/sums/samples")[LAST] in (27, 28)
    assert values(resumed, "data/facts/samples")[LAST] == 80 - values(resumed, "data/sums/samples")[LAST]
    assert values(resumed, "data/sums/epoch")[LAST] == 0
    assert set(values(straight, "valid/sums/loss/total")) == set(values(straight, "valid/facts/loss/total")) == {10, 20}
    states = [run / "checkpoints" / f"iter_{LAST:07d}" / "run_state.json" for run in (straight, resumed)]
    assert json.loads(states[0].read_text())["data"] == json.loads(states[1].read_text())["data"]
    assert [len(json.loads(state.read_text())["provenance"]["dataset_manifest_sha256"]) for state in states] == [2, 2]


def test_other_weights_are_refused(tmp_path: Path, blend: dict[str, object]) -> None:
    first = training_runs.train(tmp_path, tmp_path, **blend, train_iters=5)
    assert first.returncode == 0, first.stdout + first.stderr
    changed = {**blend, "blend": str(blend["blend"]).replace("weight: 1}", "weight: 2}", 1)}
    done = training_runs.train(tmp_path, tmp_path, resume=True, train_iters=6, **changed)
    assert done.returncode == 2
    assert "data.blend" in done.stderr and "Traceback" not in done.stderr
