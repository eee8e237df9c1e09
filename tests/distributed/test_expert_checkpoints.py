"""Experts through distributed checkpoints between our layout and upstream's, at any expert-parallel sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import TINY, tiny_config
from tests.workers import run_workers

PREFIX = "decoder.layers.1.mlp.experts."


def run(ranks: int, target: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """``target`` in this process or in several of its own."""
    return [target(*arguments)] if ranks == 1 else run_workers(ranks, target, *arguments, folder=folder)


def stored(
    expert_parallel: int, activation: str, folders: dict[str, bool], save: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """One layer's experts through a checkpoint in each of ``folders``, as ours (True) or as upstream's SequentialMLP.

    Returns:
        by folder, this rank's experts with their global numbers, in upstream's layout.
    """
    from megatron_vpmoe.runtime import distributed

    distributed.initialize(seed=7, expert_model_parallel_size=expert_parallel)
    result = {folder: _stored(expert_parallel, activation, folder, ours, save) for folder, ours in folders.items()}
    distributed.shutdown()
    return result


def _stored(expert_parallel: int, activation: str, folder: str, ours: bool, save: bool) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import get_default_pg_collection

    from megatron_vpmoe.model.moe.experts import StackedExperts
    from megatron_vpmoe.model.transformer_config import transformer_config
    from ref.sequential_experts import sequential_from_stacked

    config = transformer_config(tiny_config(expert_model_parallel_size=expert_parallel, activation=activation))
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    local, groups = TINY["num_experts"] // expert_parallel, get_default_pg_collection()
    experts = StackedExperts(local, config, groups) if ours else SequentialMLP(local, config, linears, groups)
    rank = parallel_state.get_expert_model_parallel_rank()
    generator = torch.Generator().manual_seed(5 + rank)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) if save else parameter * 0)
    # Upstream's linears have an empty extra state each, which a checkpoint of ours does not hold.
    sharded = experts.sharded_state_dict(PREFIX)
    state = {name: entry for name, entry in sharded.items() if not name.endswith("_extra_state")}
    if save:
        dist_checkpointing.save(state, folder)
    else:
        loaded: Any = dist_checkpointing.load(state, folder)
        experts.load_state_dict({name.removeprefix(PREFIX): value for name, value in loaded.items()}, strict=False)
    found = {name: value.detach().clone() for name, value in experts.named_parameters()}
    found = sequential_from_stacked(found) if ours else found
    numbered = {}
    for name, value in found.items():
        _, number, rest = name.split(".", 2)
        numbered[f"{int(number) + rank * local}.{rest}"] = value
    return numbered


@pytest.mark.parametrize(
    ("saved_at", "loaded_at", "activation"), [(2, 1, "squared_relu"), (1, 2, "squared_relu"), (2, 1, "swiglu")]
)
def test_between_our_layout_and_upstreams(saved_at: int, loaded_at: int, activation: str, tmp_path: Path) -> None:
    """What one saved, the other loads: the same keys, the same experts under the same numbers; a gate stays one."""
    saved_as = {str(tmp_path / "by_us"): True, str(tmp_path / "by_upstream"): False}
    for folder in saved_as:
        Path(folder).mkdir()
    loaded_as = {folder: not ours for folder, ours in saved_as.items()}
    saved = run(saved_at, stored, saved_at, activation, saved_as, True, folder=tmp_path)
    loaded = run(loaded_at, stored, loaded_at, activation, loaded_as, False, folder=tmp_path)
    for folder in saved_as:
        before = {name: value for result in saved for name, value in result[folder].items()}
        after = {name: value for result in loaded for name, value in result[folder].items()}
        assert before.keys() == after.keys() and len(before) == 4 * TINY["num_experts"]
        for name, value in before.items():
            assert bool(value.any()) and torch.equal(after[name], value), (folder, name)
