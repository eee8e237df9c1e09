"""Runs whose experts' products are in a narrow format learn as bf16 does, and go on where they stopped bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_vpmoe.config.expert_formats import FORMATS
from tests import training_runs
from tests.fixtures_dataset import small_dataset

pytestmark = pytest.mark.slow
pytest.importorskip("torchao", reason="torchao is not installed: make setup, or pip install torchao==0.18.0")
STEPS = 30
RUN = {"bf16": True, "moe_ffn_hidden_size": 32, "train_iters": STEPS, "lr": 1e-2, "eval_interval": None}


def test_as_bf16_learns_and_resumed_as_straight(tmp_path: Path) -> None:
    """The second half anew, with layers recomputed in the backward pass, has the same bits as without: what is rounded,
    and where rows lie, depends on nothing but the rows."""
    dataset, curves = small_dataset(tmp_path / "set", train=100), {}
    for precision in (None, *FORMATS):
        run = tmp_path / str(precision)
        done = training_runs.train(run, dataset, **RUN, experts_precision=precision, save_interval=STEPS // 2)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (f"{precision} EMULATED" in done.stdout) == (precision is not None)
        curves[precision] = list(training_runs.losses(run).values())
    plain = torch.tensor(curves.pop(None))
    assert plain[-5:].mean() < plain[:5].mean() - 0.2, "there is something to learn"
    for precision, told in curves.items():
        apart = (torch.tensor(told) / plain - 1).abs()
        print(precision, apart.max())
        assert 0 < float(apart.max()) < 0.01, (precision, apart)

        run, resumed = tmp_path / precision, tmp_path / f"{precision}_resumed"
        shutil.copytree(run, resumed)
        shutil.rmtree(resumed / "checkpoints" / f"iter_{STEPS:07d}")
        (resumed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(STEPS // 2))
        again = {"experts_precision": precision, "recompute_granularity": "full", "resume": True}
        done = training_runs.train(resumed, dataset, **RUN, **again, save_interval=STEPS // 2)
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(training_runs.losses(resumed).values()) == told


def test_a_checkpoint_goes_on_in_its_own_precision_alone(tmp_path: Path) -> None:
    dataset, run = small_dataset(tmp_path / "set", train=100), tmp_path / "run"
    short = RUN | {"train_iters": 4, "save_interval": 4}
    assert training_runs.train(run, dataset, **short, experts_precision="mxfp8").returncode == 0
    done = training_runs.train(run, dataset, **short | {"train_iters": 5}, experts_precision=None, resume=True)
    assert done.returncode == 2 and "moe.experts_precision: 'mxfp8' -> None" in done.stderr, done.stderr
