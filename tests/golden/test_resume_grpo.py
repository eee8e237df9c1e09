"""A run on its own answers: killed while it samples or updates, it goes on to the same answers and weights."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.fixtures_dataset import small_dataset
from tests.training_runs import checkpoint_tensors, records, train, train_until

pytestmark = pytest.mark.slow
SAMPLED = {
    "objective": "grpo",
    "rewards": [{"function": "tests.training_runs:even_tokens"}],
    "rollout_groups": 4,
    "rollout_group_size": 4,
    "rollout_epochs": 2,
    "rollout_max_new_tokens": 12,
    "router_replay": "replay",
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "train_iters": 10,
    "save_interval": 3,  # four steps a sampling: within one and at its end
    "num_layers": 2,
    "eval_interval": None,
    "keep_last": 9,
}


def told(run_dir: Path) -> list[tuple[int, str, float]]:
    """Metrics but for seconds, the last of each."""
    kept = {
        (record["step"], record["tag"]): record["value"]
        for record in records(run_dir)
        if record["tag"].startswith(("loss/", "policy/", "rollout/re", "rollout/le", "tokens/"))
    }
    return sorted((step, tag, value) for (step, tag), value in kept.items())


def test_killed_and_resumed_it_is_the_same_run(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "kd", train=12, valid=4)
    whole = train(tmp_path / "whole", dataset, **SAMPLED)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for step in (4, 7):  # a checkpoint within a sampling comes before; then one that is at its second epoch
        assert train_until(step, signal.SIGKILL, tmp_path / "killed", dataset, resume=True, **SAMPLED) == -9
    resumed = train(tmp_path / "killed", dataset, resume=True, **SAMPLED)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert told(tmp_path / "whole") == told(tmp_path / "killed")
    last = [tmp_path / name / "checkpoints" / "iter_0000010" for name in ("whole", "killed")]
    one, other = (checkpoint_tensors(path) for path in last)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
