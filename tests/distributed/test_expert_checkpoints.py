"""Experts through distributed checkpoints: between expert-parallel sizes, and between our layout and upstream's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import TINY, random_batch, rows_of, tiny_config
from tests.workers import run_workers

ROWS = TINY["global_batch_size"]
PREFIX = "decoder.layers.1.mlp.experts."


def trained(expert_parallel: int, folder: str, load: bool, steps: int) -> dict[str, Any]:
    """Continue from the checkpoint in ``folder`` (or start), train ``steps`` steps, save; losses and weights."""
    from megatron.core import parallel_state

    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.optim import build_optimizer, build_scheduler
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training import checkpoint
    from megatron_vpmoe.training.step import train_step

    cfg = tiny_config(expert_model_parallel_size=expert_parallel, micro_batch_size=2, run_dir=folder)
    distributed.initialize(seed=7, expert_model_parallel_size=expert_parallel)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    model = build_model(cfg)
    wrapped = wrap_for_training(model, cfg)
    optimizer = build_optimizer([wrapped], cfg)
    scheduler, objective = build_scheduler(optimizer, cfg), build_objective(cfg)
    first = 0
    if load:
        found = checkpoint.open_checkpoint(Path(folder))
        checkpoint.load(found, model, optimizer, scheduler)
        first = found.iteration
    losses, share = [], ROWS // size
    for step in range(first, first + steps):
        whole = random_batch(ROWS, TINY["seq_length"], TINY["padded_vocab_size"], seed=step)
        mine = [rows_of(whole, begin, begin + 2) for begin in range(rank * share, (rank + 1) * share, 2)]
        losses.append(train_step(wrapped, optimizer, objective, mine).metrics["loss/total"])
        scheduler.step(1)
    if not load:
        state = {"iteration": first + steps, "world_size": size}
        checkpoint.save(Path(folder), state, model, optimizer, scheduler).wait()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weights |= {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
    distributed.shutdown()
    return {"losses": losses, "weights": weights}


def joined(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The whole model's weights from those of the expert-parallel ranks."""
    first, *others = [result["weights"] for result in results]
    return {
        name: torch.cat([value, *(other[name] for other in others)]) if ".mlp.experts." in name else value
        for name, value in first.items()
    }


def run(ranks: int, target: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """``target`` in this process or in several of its own."""
    return [target(*arguments)] if ranks == 1 else run_workers(ranks, target, *arguments, folder=folder)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four steps under one rank."""
    return trained(1, str(tmp_path_factory.mktemp("straight")), False, 4)


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 1), (1, 2)])
def test_between_expert_parallel_sizes(straight: dict[str, Any], saved_at: int, loaded_at: int, tmp_path: Path) -> None:
    """Two steps, a checkpoint, and two more under another size: the same as four steps under one, in losses, weights,
    expert biases and (by what they do) optimizer states."""
    files = tmp_path / "run"
    run(saved_at, trained, saved_at, str(files), False, 2, folder=tmp_path)
    continued = run(loaded_at, trained, loaded_at, str(files), True, 2, folder=tmp_path)
    assert continued[0]["losses"] == pytest.approx(straight["losses"][2:], rel=2e-6)
    for name, got in joined(continued).items():
        # NorMuon enlarges the rounding of another order of sums; an update is about 1e-2 here.
        torch.testing.assert_close(got, straight["weights"][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)


def stored(expert_parallel: int, folders: dict[str, bool], save: bool) -> dict[str, dict[str, torch.Tensor]]:
    """One layer's experts through a checkpoint in each of ``folders``, as ours (True) or as upstream's SequentialMLP.

    Returns:
        by folder, this rank's experts with their global numbers, in upstream's layout.
    """
    from megatron_vpmoe.runtime import distributed

    distributed.initialize(seed=7, expert_model_parallel_size=expert_parallel)
    result = {folder: _stored(expert_parallel, folder, ours, save) for folder, ours in folders.items()}
    distributed.shutdown()
    return result


def _stored(expert_parallel: int, folder: str, ours: bool, save: bool) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import get_default_pg_collection

    from megatron_vpmoe.model.moe.experts import StackedExperts
    from megatron_vpmoe.model.transformer_config import transformer_config
    from ref.sequential_experts import sequential_from_stacked

    config = transformer_config(tiny_config(expert_model_parallel_size=expert_parallel))
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
        loaded = dist_checkpointing.load(state, folder)
        experts.load_state_dict({name.removeprefix(PREFIX): value for name, value in loaded.items()}, strict=False)
    found = {name: value.detach().clone() for name, value in experts.named_parameters()}
    found = sequential_from_stacked(found) if ours else found
    numbered = {}
    for name, value in found.items():
        _, number, rest = name.split(".", 2)
        numbered[f"{int(number) + rank * local}.{rest}"] = value
    return numbered


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 1), (1, 2)])
def test_between_our_layout_and_upstreams(saved_at: int, loaded_at: int, tmp_path: Path) -> None:
    """What one saved, the other loads: the same keys, the same experts under the same numbers."""
    saved_as = {str(tmp_path / "by_us"): True, str(tmp_path / "by_upstream"): False}
    for folder in saved_as:
        Path(folder).mkdir()
    loaded_as = {folder: not ours for folder, ours in saved_as.items()}
    saved = run(saved_at, stored, saved_at, saved_as, True, folder=tmp_path)
    loaded = run(loaded_at, stored, loaded_at, loaded_as, False, folder=tmp_path)
    for folder in saved_as:
        before = {name: value for result in saved for name, value in result[folder].items()}
        after = {name: value for result in loaded for name, value in result[folder].items()}
        assert before.keys() == after.keys() and len(before) == 4 * TINY["num_experts"]
        for name, value in before.items():
            assert bool(value.any()) and torch.equal(after[name], value), (folder, name)
