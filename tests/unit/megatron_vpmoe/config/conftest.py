"""Configurations for the tests: the shipped files, a small fixed one, and variations of it written on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

# Fixed here, so that tuning the shipped nano configuration changes no expectation of a test.
SMALL = """
model: {num_layers: 8, hidden_size: 128, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2,
  kv_channels: 32, padded_vocab_size: 512, window_size: 32}
moe: {num_experts: 16, moe_ffn_hidden_size: 32, moe_shared_expert_intermediate_size: 128, moe_router_num_groups: 4,
  moe_router_group_topk: 2}
optim: {lr: 1e-2, normuon_aux_lr: 3e-3, min_lr: 1e-3, lr_warmup_iters: 20}
parallel: {expert_model_parallel_size: 1, nproc_per_node: 2}
data: {seq_length: 512}
training: {run_name: small, micro_batch_size: 8, global_batch_size: 16, train_iters: 400, bf16: false,
  recompute_granularity: null}
checkpoint: {save_interval: 100, keep_every: null}
logging: {router_dead_experts_warn: 28}
"""


@pytest.fixture(scope="session")
def stage1(repository: Path) -> Path:
    return repository / "configs" / "vpmoe_stage1.yaml"


@pytest.fixture(scope="session")
def small(stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(f"extends: {stage1}\n{SMALL}")
    return path


@pytest.fixture
def child(tmp_path: Path, small: Path) -> Callable[..., Path]:
    """Write a configuration that extends the small one and says only what the test is about."""

    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(f"extends: {small}\n{text}")
        return path

    return write
