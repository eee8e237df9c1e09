"""A run on its own answers over several ranks, with data, experts or matrices shared out, is the run of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fixtures_dataset import small_dataset
from tests.golden.test_resume_grpo import SAMPLED, told
from tests.training_runs import (
    checkpoint_tensors,
    command,
    records,
    sampled,
    train,
    train_in_workers,
    worker,
)
from tests.workers import run_workers

pytestmark = pytest.mark.slow
# A large eps: Adam turns the sign of a rounding error into a full update otherwise. Held-out rewards at the end.
OF_RANKS = {"train_iters": 5, "adam_eps": 1e-3, "save_interval": 1, "eval_interval": 5, "eval_iters": 1}
FIELDS = {**SAMPLED, **OF_RANKS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "kd", train=12, valid=4)


def test_two_ranks_sample_and_learn_what_one_does(tmp_path: Path, dataset: Path) -> None:
    """Losses by sequence, with answers a step old; other runs, of more kinds, change ranks half way (test_reshard)."""
    fields = {
        **FIELDS,
        "grpo_normalisation": "sequence",
        "rollout_epochs": 1,
        "router_replay": "off",
        "rollout_staleness": 1,
    }
    alone = train(tmp_path / "one", dataset, **fields)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    train_in_workers(2, tmp_path / "two", dataset, **fields)
    same_metrics(tmp_path / "one", tmp_path / "two")
    held_out = [
        {r["tag"]: r["value"] for r in records(tmp_path / name) if r["tag"].startswith("valid/re")}
        for name in ("one", "two")
    ]
    assert held_out[0] and held_out[0] == pytest.approx(held_out[1], abs=1e-6)
    for iteration in (1, 3, 5):
        there, here = (tmp_path / name / "checkpoints" / f"iter_{iteration:07d}" for name in ("one", "two"))
        if (there / "position.npz").exists():
            same_answers(sampled(there), sampled(here))
        one, other = (
            {k: v for k, v in checkpoint_tensors(p).items() if not k.startswith("optim")} for p in (there, here)
        )
        assert one.keys() == other.keys()
        for key, weights in one.items():
            torch.testing.assert_close(other[key], weights, rtol=1e-4, atol=5e-5, msg=lambda m, k=key: f"{k}: {m}")


def same_metrics(one: Path, other: Path) -> None:
    here, there = told(one), told(other)
    assert [entry[:2] for entry in here] == [entry[:2] for entry in there]
    for (step, tag, value), (_, _, found) in zip(here, there, strict=True):
        assert found == pytest.approx(value, rel=1e-3, abs=1e-5), (step, tag)


def same_answers(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Up to fp32's rounding in what is no token and no count."""
    assert one.keys() == other.keys()
    for name, column in one.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(other[name], column, rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(other[name], column, err_msg=name)


def test_a_reward_that_fails_ends_every_rank_with_the_sample(
    tmp_path: Path, dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {**FIELDS, "rewards": [{"function": "tests.training_runs:fails"}], "nproc_per_node": 2}
    assert run_workers(2, worker, command(tmp_path / "run", dataset, **fields)[3:], folder=tmp_path) == [2, 2]
    assert "the reward fails failed with KeyError" in capfd.readouterr().err
