"""The optimizer's work and state are shared out over data-parallel ranks, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.tiny import TINY, random_batch, rows_of, tiny_config
from tests.workers import run_workers

ROWS, STEPS = TINY["global_batch_size"], 4


def trained(folder: str, first: int, last: int, options: dict[str, Any]) -> dict[str, Any]:
    """Steps ``first`` to ``last`` on all processes there are; from the checkpoint in ``folder`` if first is not 0."""
    from megatron.core import parallel_state

    from megatron_vpmoe.config import slices
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.optim import build_optimizer, build_scheduler
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training import checkpoint
    from megatron_vpmoe.training.step import train_step

    most = options.pop("most", slices._MOST)
    cfg = tiny_config(micro_batch_size=1, clip_grad=0.1, **options)
    experts = cfg.parallel.expert_model_parallel_size
    distributed.initialize(seed=7, expert_model_parallel_size=experts)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    model = build_model(cfg)
    with mock.patch.object(slices, "_MOST", most):
        wrapped = wrap_for_training(model, cfg)
    optimizer = build_optimizer([wrapped], cfg)
    scheduler, objective = build_scheduler(optimizer, cfg), build_objective(cfg)
    if first:
        checkpoint.load(checkpoint.open_checkpoint(Path(folder)), model, optimizer, scheduler)
    losses, norms, groups, share = [], [], [], ROWS // size
    for step in range(first, last):
        whole = random_batch(ROWS, TINY["seq_length"], TINY["padded_vocab_size"], seed=step)
        own = [rows_of(whole, i, i + 1) for i in range(rank * share, (rank + 1) * share)]
        result = train_step(wrapped, optimizer, objective, own, measure=True)
        groups.append(result.groups)
        losses.append(result.metrics["loss/total"])
        norms.append(result.grad_norm)
        scheduler.step(1)
    if first < last < STEPS:
        state = {"iteration": last, "world_size": distributed.world_size()}
        checkpoint.save(Path(folder), state, model, optimizer, scheduler).wait()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = state_of_pieces(model, optimizer)
    distributed.shutdown()
    return {"losses": losses, "norms": norms, "groups": groups, "weights": weights, "state": state}


def state_of_pieces(model: torch.nn.Module, optimizer: Any) -> dict[tuple[str, str], tuple[int, torch.Tensor]]:
    """(state, parameter) -> first index and values of this rank's piece; masters are a state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        (state, names[id(piece.param)]): (piece.start, tensor.clone())
        for member in optimizer.members
        for piece, leaf in zip(member.pieces, member.get_parameters(), strict=True)
        for state, tensor in {"master": leaf.detach(), **member.state[leaf]}.items()
        if state != "step"
    }


def joined_state(results: list[dict[str, Any]], expert_parallel: bool) -> dict[tuple[str, str], torch.Tensor]:
    """Whole tensors from the pieces of all ranks; each index has one holder, or each rank has experts of its own."""
    joined: dict[tuple[str, str], torch.Tensor] = {}
    for key in dict.fromkeys(key for result in results for key in result["state"]):
        parts = [result["state"][key] for result in results if key in result["state"]]
        position = 0
        for start, values in parts:
            assert start == (0 if expert_parallel and ".experts." in key[1] else position), key
            position += len(values) if values.ndim else 1
        joined[key] = torch.cat([values for _, values in parts]) if len(parts) > 1 else parts[0][1]
    return joined


def on(ranks: int, folder: Path, first: int, last: int, **options: Any) -> list[dict[str, Any]]:
    """``trained`` in this process or in several; the weights of expert-parallel ranks are joined."""
    arguments = (str(folder / "run"), first, last, options)
    results = [trained(*arguments)] if ranks == 1 else run_workers(ranks, trained, *arguments, folder=folder)
    if options.get("expert_model_parallel_size", 1) > 1:
        for name in results[0]["weights"]:
            if ".experts." in name:
                joined = torch.cat([result["weights"][name] for result in results])
                results[0]["weights"][name] = results[1]["weights"][name] = joined
    return results


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All steps in one process."""
    return on(1, tmp_path_factory.mktemp("straight"), 0, STEPS)[0]


def assert_same(result: dict[str, Any], expected: dict[str, Any], first: int = 0) -> None:
    for key in ("losses", "norms"):
        torch.testing.assert_close(torch.tensor(result[key]), torch.tensor(expected[key][first:]), rtol=2e-5, atol=1e-6)
    for ours, theirs in zip(result["groups"], expected["groups"][first:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-7) and "update_rms/expert_matrices" in theirs
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(
            result["weights"][name], weight, rtol=1e-4, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_two_ranks_share_the_state_and_take_the_same_steps(straight: dict[str, Any], tmp_path: Path) -> None:
    """Also with the gradients summed while the backward pass runs, and with clipping."""
    results = on(2, tmp_path, 0, STEPS)
    for result in results:
        assert_same(result, straight)
    assert all(torch.equal(weight, results[1]["weights"][name]) for name, weight in results[0]["weights"].items())
    assert {k: v.shape for k, v in joined_state(results, False).items()} == {
        key: values.shape for key, (_, values) in straight["state"].items()
    }
    held = [sum(values.numel() for _, values in result["state"].values()) for result in (*results, straight)]
    assert held[0] + held[1] == held[2] and min(held) > 0.4 * held[2]


@pytest.mark.parametrize("bf16", [False, True])
def test_unequal_slices_take_the_same_steps(straight: dict[str, Any], bf16: bool, tmp_path: Path) -> None:
    """As where there are more ranks than matrices; weights are brought to everybody as they are, bit for bit."""
    one, two = on(2, tmp_path, 0, STEPS, most=0, bf16=bf16)
    assert all(torch.equal(weight, two["weights"][name]) for name, weight in one["weights"].items())
    if not bf16:
        assert_same(one, straight)
        return
    masters = {name: value for (state, name), value in joined_state([one, two], False).items() if state == "master"}
    assert all(
        torch.equal(value.to(one["weights"][name].dtype), one["weights"][name]) for name, value in masters.items()
    )


@pytest.mark.parametrize(("saved", "loaded"), [((2, 1), (1, 1)), ((2, 1), (2, 2))], ids=["DP 2 to 1", "DP 2 to EP 2"])
def test_masters_and_state_of_bf16_come_back_bit_for_bit(
    saved: tuple[int, int], loaded: tuple[int, int], tmp_path: Path
) -> None:
    options = {"bf16": True, "normuon_momentum_dtype": "bfloat16"}
    before = joined_state(on(saved[0], tmp_path, 0, 2, **options), False)
    assert before["momentum_buffer", "decoder.layers.1.mlp.experts.fc1_weight"].dtype == torch.bfloat16
    results = on(loaded[0], tmp_path, 2, 2, expert_model_parallel_size=loaded[1], **options)
    after = joined_state(results, expert_parallel=loaded[1] > 1)
    assert before.keys() == after.keys()
    for key, values in before.items():
        assert values.dtype == after[key].dtype and torch.equal(values, after[key]), key
    assert any(not torch.equal(v, v.bfloat16().float()) for (state, _), v in before.items() if state == "master")
