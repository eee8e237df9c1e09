"""The small mixtures of configs/nano_moe learn: a few steps of the real loop's step on one batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vpmoe.config import load_config
from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.optim import build_optimizer
from megatron_vpmoe.training.step import train_step
from tests.tiny import random_batch

STEPS, ROWS, LENGTH = 5, 2, 48


# DeepSeek's shape at test size: sigmoid routing with a bias, a shared expert, a first layer that is dense.
SMALL = "--num-layers 3 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2"
SMALL += " --kv-channels 16 --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 32 --no-bf16"
SMALL += " --lr 3e-2 --normuon-aux-lr 2e-2 --lr-warmup-iters 0"


@pytest.mark.parametrize(
    ("name", "more"),
    [("tiny", "--optimizer normuon"), ("tiny", "--optimizer adam"), ("moonlet", SMALL)],
)
def test_it_learns_a_batch(name: str, more: str, repository: Path, single_process: None) -> None:
    flags = ["--seq-length", f"{LENGTH}", "--nproc-per-node", "1", "--padded-vocab-size", "64", *more.split()]
    cfg = load_config(repository / "configs" / "nano_moe" / f"{name}.yaml", flags)
    wrapped = wrap_for_training(build_model(cfg).train(), cfg)
    update, objective = build_optimizer([wrapped], cfg), build_objective(cfg)
    batch = random_batch(ROWS, LENGTH, cfg.model.padded_vocab_size, seed=0)
    losses = [train_step(wrapped, update, objective, [batch]).metrics["loss/total"] for _ in range(STEPS)]
    assert losses[0] == pytest.approx(4.16, abs=0.3), "an even guess among 64"
    assert losses[-1] < losses[0] - 1.0, losses
