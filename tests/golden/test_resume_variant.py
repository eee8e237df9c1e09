"""Other designs train and resume bit for bit: the far end of the ladder from vpMoE, a Qwen3 (SwiGLU, tied, no biases,
RoPE), and state space layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import training_runs
from tests.fixtures_dataset import small_dataset

pytestmark = pytest.mark.slow
QWEN3 = {
    "num_experts": None,
    "window_size": None,
    "local_position_embedding": "none",
    "global_position_embedding": "rope",
    "tpa": False,
    "softmax_type": "vanilla",
    "value_residual": False,
    "activation": "swiglu",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": False,
    "lr": 1e-2,  # six steps are to show that it learns, the same whatever the quickstart's are
    "kd_span_weight_final": 1.0,
    "train_iters": 6,
    "save_interval": 3,
}
STATE_SPACE = {
    "num_experts": None,
    "layer_type": "state_space",
    "ssm_inner_size": 48,
    "ssm_step_rank": 4,
    "init_method_std": 0.2,  # a first loss above that of knowing nothing, which six steps see fall
    "untie_embeddings_and_output_weights": False,
    **{name: QWEN3[name] for name in ("lr", "kd_span_weight_final", "train_iters", "save_interval")},
}


@pytest.mark.parametrize("variant", [QWEN3, STATE_SPACE], ids=["Qwen3", "state space"])
def test_interrupted_at_half_and_resumed(tmp_path: Path, variant: dict[str, Any]) -> None:
    dataset = small_dataset(tmp_path / "set", train=100)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    done = training_runs.train(straight, dataset, **variant)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = training_runs.losses(straight)
    assert list(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < losses[1]

    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "iter_0000006")
    (resumed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    done = training_runs.train(resumed, dataset, **variant, resume=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iter_0000003" in done.stdout
    assert training_runs.losses(resumed) == losses
    ours, expected = (training_runs.checkpoint_tensors(d / "checkpoints" / "iter_0000006") for d in (resumed, straight))
    assert ours.keys() == expected.keys() and not any("output_layer" in key for key in ours)
    assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []
