"""Rung 6 under expert parallelism: the sparse model's logits are the dense one's at EP 2 too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_config
from tests.unit.vpmoe.upcycle.test_dense_to_experts import SPARSE
from tests.unit.vpmoe.upcycle.tiny_rungs import dense_config, random_weights
from tests.workers import run_workers
from vpmoe.hf.convert import Carried, run_state
from vpmoe.upcycle.experts import Conversion, ExpertsSettings, converted
from vpmoe.upcycle.rung_below import logits_of
from vpmoe.weights.megatron_checkpoint import write_checkpoint
from vpmoe.weights.tensors import random_prompts

pytestmark = pytest.mark.slow
PROMPTS = random_prompts(32, [30], seed=0)
EXACT: tuple[Any, ...] = ("zero_out", "virtual_groups")


def logits_at_two_ranks(folder: str) -> list[torch.Tensor]:
    """The logits of every checkpoint in ``folder`` on this rank, experts shared out over both."""
    from megatron_vpmoe.model.attention.masks import left_padded
    from megatron_vpmoe.model.builder import build_model
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training import checkpoint

    distributed.initialize(seed=7, expert_model_parallel_size=2)
    found = []
    for init in EXACT:
        model = build_model(tiny_config(**SPARSE, expert_model_parallel_size=2)).eval()
        checkpoint.load(checkpoint.open_checkpoint(Path(folder) / init), model)
        with torch.no_grad():
            found.append(model(*left_padded(PROMPTS, torch.device("cpu"))).logits()[0])
    distributed.shutdown()
    return found


def test_the_same_logits_at_one_rank_and_at_two(tmp_path: Path) -> None:
    old, new = dense_config(num_layers=2), tiny_config(**SPARSE)
    weights = random_weights(old)
    dense = logits_of(old, weights, PROMPTS, source="dense")[0]
    for init in EXACT:
        sparse = converted(weights, Conversion.of(new, old, ExpertsSettings(init_experts=init), source="test"))
        torch.testing.assert_close(logits_of(new, sparse, PROMPTS, source=init)[0], dense, rtol=0, atol=1e-5)
        write_checkpoint(tmp_path / init, sparse, run_state(new, Carried(32)))
    for on_rank in run_workers(2, logits_at_two_ranks, str(tmp_path), folder=tmp_path):
        for logits in on_rank:
            torch.testing.assert_close(logits, dense, rtol=0, atol=1e-5)
