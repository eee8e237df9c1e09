"""A run on its own answers: stopped while it samples or updates, it goes on to the same answers and weights."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fixtures_dataset import small_dataset
from tests.training_runs import checkpoint_tensors, records, sampled, train, train_signalled

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
    "async_save": False,  # a kill finds each checkpoint that was begun
    "num_layers": 2,
    "eval_interval": None,
    "keep_last": 9,
}
TAUGHT = {
    **{name: value for name, value in SAMPLED.items() if name != "objective"},
    "objective": "on_policy",
    "rollout_groups": 16,
    "rollout_group_size": 1,
    "opd_anchor_share": 0.3,
    "rollout_staleness": 2,
}
"""A teacher's scores instead of rewards, which are only measured; beside the answers stored conversations. The next
sampling begins with the third step of the four that one serves."""
A_TOKEN = "megatron_vpmoe.generation.engine:_Engine._step"
A_MICRO_BATCH = {
    "grpo": "megatron_vpmoe.objectives.grpo:GRPO.__call__",
    "on_policy": "megatron_vpmoe.objectives.on_policy:OnPolicy.__call__",
}


def with_teacher(folder: Path, dataset: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, of on_policy with a teacher of another shape that was trained a little."""
    if fields["objective"] != "on_policy":
        return fields
    teacher = {"num_layers": 3, "hidden_size": 48, "num_experts": None, "lr_warmup_iters": 1, "train_iters": 2}
    trained = train(folder / "teacher", dataset, **teacher)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    return {**fields, "teacher_weights": folder / "teacher"}


def told(run_dir: Path) -> list[tuple[int, str, float]]:
    """Metrics but for seconds, the last of each."""
    kept = {
        (record["step"], record["tag"]): record["value"]
        for record in records(run_dir)
        if record["tag"].startswith(("loss/", "policy/", "gap/", "rollout/re", "rollout/le", "tokens/", "data/"))
    }
    return sorted((step, tag, value) for (step, tag), value in kept.items())


def saved(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in (run_dir / "checkpoints").glob("iter_*"))


# A sampling takes at most 12 tokens. In between: within the second, after step 4; then within a step of it.
IN_BETWEEN = [(A_TOKEN, 18, [3], {4}), (A_MICRO_BATCH["grpo"], 8, [3, 6], {6})]
# Beside: within a step after the checkpoint that holds the second; then within the third, which begins with step 7.
BESIDE = [(A_MICRO_BATCH["on_policy"], 11, [3], {3}), (A_TOKEN, 6, [3, 6], {6, 7, 8})]


@pytest.mark.parametrize(("sampled_by", "kills"), [(SAMPLED, IN_BETWEEN), (TAUGHT, BESIDE)], ids=["grpo", "on_policy"])
def test_stopped_anywhere_and_resumed_it_is_the_same_run(
    tmp_path: Path, sampled_by: dict[str, Any], kills: list[tuple[str, int, list[int], set[int]]]
) -> None:
    """Also where rewards of held-out prompts are measured on the way."""
    dataset = small_dataset(tmp_path / "kd", train=12, valid=4)
    wanted = with_teacher(tmp_path, dataset, sampled_by)
    whole = train(tmp_path / "whole", dataset, **wanted)
    assert whole.returncode == 0, whole.stdout + whole.stderr

    run_dir = tmp_path / "stopped"
    fields = {**wanted, "resume": True}
    for place, count, checkpoints, last in kills:
        assert train_signalled(place, count, signal.SIGKILL, run_dir, dataset, **fields).returncode == -9
        assert saved(run_dir) == checkpoints and max(record["step"] for record in records(run_dir)) in last
    # Asked politely within the third.
    asked = train_signalled(A_TOKEN, 5, signal.SIGTERM, run_dir, dataset, **fields)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    if kills == IN_BETWEEN:  # it leaves it at once and saves what came before
        assert "asked to stop: what came after step 8" in asked.stdout and saved(run_dir) == [3, 6, 8]
    else:  # at the latest it stops with the last step before that needs it, and then waits for it
        assert set(saved(run_dir)) <= {3, 6, 7, 8}
    left = set(range(max(saved(run_dir)) + 1, 11))
    resumed = train(run_dir, dataset, **{**fields, "eval_interval": 1, "eval_iters": 1})
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert {record["step"] for record in records(run_dir) if record["tag"] == "valid/reward/even_tokens"} == left

    assert told(tmp_path / "whole") == told(run_dir)
    for iteration in (3, 6, 9, 10):
        here, there = (folder / "checkpoints" / f"iter_{iteration:07d}" for folder in (run_dir, tmp_path / "whole"))
        one, other = sampled(here), sampled(there)
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
        mine, theirs = checkpoint_tensors(here), checkpoint_tensors(there)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
