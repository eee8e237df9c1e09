"""The optimizer as a whole: global norm, clipping, refusal of what is not finite, Megatron's DDP, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from toy_model import ToyModel, toy_config

from megatron_vpmoe.optim import VpOptimizer, build_optimizer, build_scheduler
from megatron_vpmoe.optim.normuon import NorMuon
from megatron_vpmoe.runtime.sharded_data_parallel import ShardedDataParallel

pytestmark = pytest.mark.usefixtures("single_process")


def tensors_of(model: ToyModel, optimizer: VpOptimizer) -> list[torch.Tensor]:
    """Copies of all parameters and all optimizer state."""
    state = [
        member.state[param][name]
        for member in optimizer.chained_optimizers
        for param in member.get_parameters()
        for name in sorted(member.state[param])
    ]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *state]]


def test_members_hold_every_parameter_once() -> None:
    model = ToyModel()
    optimizer = build_optimizer([model], toy_config())
    members = optimizer.chained_optimizers
    kinds = [(type(member.optimizer).__name__, member.param_groups[0]["is_expert_parallel"]) for member in members]
    assert kinds == [("AdamW", False), ("AdamW", True), ("NorMuon", False), ("NorMuon", True)]
    held = [id(param) for member in members for param in member.get_parameters()]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_groups_of_a_member_are_told_apart_by_megatrons_keys() -> None:
    for cfg in (toy_config(), toy_config(optimizer="adam")):
        for member in build_optimizer([ToyModel()], cfg).chained_optimizers:
            keys = [
                tuple(group[key] for key in ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr"))
                for group in member.param_groups
            ]
            assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_norm_is_global(bf16: bool) -> None:
    model = ToyModel(bf16=bf16)
    optimizer = build_optimizer([model], toy_config(bf16=bf16))
    model.set_gradients(0)
    expected = math.sqrt(sum(float(p.main_grad.double().square().sum()) for p in model.parameters()))
    _, grad_norm, _ = optimizer.step()
    assert grad_norm == pytest.approx(expected, rel=1e-6)


def test_clipping_scales_the_gradient_of_the_whole_model() -> None:
    clipped, scaled = ToyModel(), ToyModel()
    scaled.load_state_dict(clipped.state_dict())
    a, b = build_optimizer([clipped], toy_config(clip_grad=0.5)), build_optimizer([scaled], toy_config(clip_grad=0.0))
    clipped.set_gradients(0)
    updated, norm, _ = a.step()
    assert updated
    scaled.set_gradients(0, scale=0.5 / norm)
    b.step()
    for ours, theirs in zip(tensors_of(clipped, a), tensors_of(scaled, b), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["output_layer.weight", "decoder.layers.1.mlp.experts.fc1_weight"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, name: str, bf16: bool) -> None:
    model = ToyModel(bf16=bf16)
    optimizer = build_optimizer([model], toy_config(bf16=bf16))
    model.set_gradients(0)
    optimizer.step()
    before = tensors_of(model, optimizer)
    model.set_gradients(1)
    dict(model.named_parameters())[name].main_grad.view(-1)[3] = value
    updated, grad_norm, _ = optimizer.step()
    assert not updated and not math.isfinite(grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(model, optimizer), strict=True))
    model.set_gradients(2)
    assert optimizer.step()[0]


@pytest.mark.parametrize("optimizer_name", ["normuon", "adam"])
def test_every_parameter_moves(optimizer_name: str) -> None:
    model = ToyModel()
    optimizer = build_optimizer([model], toy_config(optimizer=optimizer_name))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.set_gradients(0)
    optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert any(isinstance(m.optimizer, NorMuon) for m in optimizer.chained_optimizers) == (optimizer_name == "normuon")


def test_parameters_that_stay_fp32_have_no_second_copy() -> None:
    model = ToyModel(bf16=True)
    optimizer = build_optimizer([model], toy_config(bf16=True))
    held = {id(p) for m in optimizer.chained_optimizers for p in m.get_parameters()}
    for name, param in model.named_parameters():
        assert (id(param) in held) == (param.dtype == torch.float32), name
    model.set_gradients(0)
    optimizer.step()
    for member in optimizer.chained_optimizers:
        masters = [p for group in member.param_groups for p in group["params"]]
        for param, master in zip(member.model_params, masters, strict=True):
            assert torch.equal(param, master.to(param.dtype))


def test_buffers_feed_the_step() -> None:
    model = ToyModel()
    ddp = ShardedDataParallel(model.config, model, overlap_grad_reduce=True)
    optimizer = build_optimizer([ddp], toy_config(clip_grad=0.0))
    weights = [p.detach().clone() for p in model.parameters()]
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    sum(p.float().square().sum() for p in model.parameters()).backward()
    ddp.finish_grad_sync()
    _, grad_norm, _ = optimizer.step()
    expected = math.sqrt(sum(float((2 * weight).square().sum()) for weight in weights))
    assert grad_norm == pytest.approx(expected, rel=1e-5)
    for before, param in zip(weights, model.parameters(), strict=True):
        assert before.count_nonzero() == 0 or not torch.equal(before, param)


def build(bf16: bool) -> tuple[ToyModel, VpOptimizer, Any]:
    cfg, model = toy_config(bf16=bf16), ToyModel(bf16=bf16)
    optimizer = build_optimizer([model], cfg)
    return model, optimizer, build_scheduler(optimizer, cfg)


def train(model: ToyModel, optimizer: VpOptimizer, scheduler: Any, seeds: range) -> None:
    for seed in seeds:
        model.set_gradients(seed)
        optimizer.step()
        scheduler.step(1)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("saved_at", [0, 3])
def test_a_checkpoint_continues_bit_for_bit(tmp_path: Path, bf16: bool, saved_at: int) -> None:
    """Also from before the first step, when torch's optimizers would have no state at all."""
    model, optimizer, scheduler = build(bf16)
    train(model, optimizer, scheduler, range(saved_at))
    model_state = model.sharded_state_dict()
    state = {"model": model_state, "optimizer": optimizer.sharded_state_dict(model_state)}
    dist_checkpointing.save(state, str(tmp_path))

    resumed, resumed_optimizer, resumed_scheduler = build(bf16)
    assert not torch.equal(resumed.output_layer.weight, model.output_layer.weight)
    model_state = resumed.sharded_state_dict()
    state = {"model": model_state, "optimizer": resumed_optimizer.sharded_state_dict(model_state, is_loading=True)}
    loaded = dist_checkpointing.load(state, str(tmp_path))
    resumed.load_state_dict(loaded["model"])
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    resumed_scheduler.load_state_dict(scheduler.state_dict())

    for run in ((model, optimizer, scheduler), (resumed, resumed_optimizer, resumed_scheduler)):
        train(*run, range(saved_at, saved_at + 3))
    pairs = zip(tensors_of(model, optimizer), tensors_of(resumed, resumed_optimizer), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
