"""A denoiser over the embedding of a trained expert trains through the loop, validates, and resumes bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests import training_runs
from tests.fixtures_dataset import small_dataset

pytestmark = pytest.mark.slow

PLAIN = {
    **training_runs.PLAIN,
    "train_iters": 6,
    "save_interval": 3,
    "eval_interval": 3,
}
EMBEDDING = "embedding.word_embeddings.weight"


def test_from_an_experts_embedding_interrupted_and_resumed(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "set", train=100)
    expert, straight, resumed = (tmp_path / name for name in ("expert", "straight", "resumed"))
    done = training_runs.train(expert, dataset, **{**PLAIN, "objective": "token_ce", "train_iters": 3})
    assert done.returncode == 0, done.stdout + done.stderr
    denoiser = {
        **PLAIN,
        "layer_type": "denoiser",
        "objective": "denoising",
        "train_only": '["decoder.*"]',
        "load_embedding": expert,
    }
    done = training_runs.train(straight, dataset, **denoiser)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"embedding from {expert}" in done.stdout
    losses, measured = training_runs.losses(straight), training_runs.measured(straight)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[1] == pytest.approx(1, abs=0.1) and losses[6] < losses[1] - 0.05
    assert measured[6, "valid/loss/total"] < measured[3, "valid/loss/total"]
    assert measured[6, "valid/denoised/error"] > 0
    ours = training_runs.checkpoint_tensors(straight / "checkpoints" / "iter_0000006")
    of_expert = training_runs.checkpoint_tensors(expert / "checkpoints" / "iter_0000003")
    assert torch.equal(ours[EMBEDDING], of_expert[EMBEDDING])
    assert not any(EMBEDDING in key for key in ours if key.startswith("optimizer"))

    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "iter_0000006")
    (resumed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    done = training_runs.train(resumed, dataset, **denoiser, resume=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert training_runs.losses(resumed) == losses and training_runs.measured(resumed) == measured
    again = training_runs.checkpoint_tensors(resumed / "checkpoints" / "iter_0000006")
    assert [key for key in ours if not torch.equal(ours[key], again[key])] == []
