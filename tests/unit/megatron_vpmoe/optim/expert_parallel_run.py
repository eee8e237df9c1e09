"""The child process of the resharding test: importable without pytest, megatron.core prepared first."""

from __future__ import annotations

import os

import torch
from toy_model import ToyModel, toy_config

from megatron_vpmoe.optim import VpOptimizer, build_optimizer
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.sharded_data_parallel import ShardedDataParallel


def toy_run(rank: int, ranks: int) -> tuple[ToyModel, VpOptimizer]:
    """The same model on any number of expert-parallel ranks."""
    torch.manual_seed(7)
    model = ToyModel(rank=rank, ranks=ranks)
    wrapped = ShardedDataParallel(model.config, model, overlap_grad_reduce=False)
    return model, build_optimizer([wrapped], toy_config())


def train_and_save(rank: int, ranks: int, port: int, directory: str) -> None:
    """Two steps on ``ranks`` expert-parallel ranks, then a checkpoint."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.initialize(seed=1, expert_model_parallel_size=ranks)
    from megatron.core import dist_checkpointing

    model, optimizer = toy_run(rank, ranks)
    grad_norm = 0.0
    for seed in range(2):
        model.set_gradients(seed)
        _, grad_norm, _ = optimizer.step()
    state = model.sharded_state_dict()
    saved = {"model": state, "optimizer": optimizer.sharded_state_dict(state), "grad_norm": grad_norm}
    dist_checkpointing.save(saved, directory)
    distributed.shutdown()
