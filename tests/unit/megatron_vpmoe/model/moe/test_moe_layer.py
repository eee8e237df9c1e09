"""The whole MoE layer: every token arrives, is weighted rightly and comes back to its place; nothing is waited for."""

from __future__ import annotations

import copy

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, get_default_pg_collection
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_vpmoe.model.layer_specs import layer_spec
from megatron_vpmoe.model.moe.layer import VPMoELayer
from megatron_vpmoe.model.transformer_config import transformer_config
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

SEQ, ROWS, HIDDEN, EXPERTS, TOPK = 12, 3, 32, 8, 2


def layer_of(**changes: object) -> MoELayer:
    """Layer 2 of the tiny model without a shared expert, in fp64, with random weights."""
    cfg = tiny_config(
        moe_shared_expert_intermediate_size=None,
        moe_router_dtype="fp64",
        **changes,
    )
    config = transformer_config(cfg)
    spec = layer_spec(config, 2).submodules.mlp
    layer = spec.module(config, spec.submodules, layer_number=2, pg_collection=get_default_pg_collection())
    generator = torch.Generator().manual_seed(0)
    layer.double().train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return layer


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(SEQ, ROWS, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(layer: MoELayer, x_SBH: Tensor) -> Tensor:
    """Every token through each expert that its router gave weight to, one token and one expert at a time."""
    probs, chosen = layer.router(x_SBH)
    out = []
    for token, x in enumerate(x_SBH.reshape(-1, HIDDEN)):
        total = torch.zeros(HIDDEN, dtype=x.dtype)
        for e in chosen[token].nonzero().flatten().tolist():
            w = layer.experts
            hidden = torch.relu(w.fc1_weight[e] @ x + w.fc1_bias[e]) ** 2
            total = total + probs[token, e] * (w.fc2_weight[e] @ hidden + w.fc2_bias[e])
        out.append(total)
    return torch.stack(out).view_as(x_SBH)


def to_one_expert(layer: MoELayer, expert: int) -> None:
    """Make the expert bias send every token to ``expert`` (and to a second one, as top-k is 2)."""
    with torch.no_grad():
        layer.router.expert_bias.zero_()
        layer.router.expert_bias[expert] = 100.0


@pytest.mark.parametrize("crowded", [False, True])
def test_equals_a_loop_over_experts(crowded: bool) -> None:
    """Output and all gradients, the router's included, in fp64; also with one expert that takes every token."""
    layer, grad = layer_of(), tokens(2)
    if crowded:
        to_one_expert(layer, 3)
    found = []
    for run in (lambda x: layer(x)[0], lambda x: looped(layer, x)):
        x = tokens().requires_grad_()
        out = run(x)
        inputs = [x, *layer.parameters()]
        found.append([out, *torch.autograd.grad(out, inputs, grad, materialize_grads=True)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_tokens_in_are_tokens_out() -> None:
    """With experts that ignore their input and return a constant of their own, each token's output says which experts
    it visited with which weight."""
    layer = layer_of()
    with torch.no_grad():
        layer.experts.fc2_weight.zero_()
        layer.experts.fc2_bias.copy_(torch.eye(EXPERTS, HIDDEN, dtype=torch.float64))
    probs, chosen = layer.router(tokens())
    out = layer(tokens())[0].reshape(-1, HIDDEN)[:, :EXPERTS]
    torch.testing.assert_close(out, probs)
    assert torch.equal(out > 0, chosen)
    assert int(chosen.sum()) == SEQ * ROWS * TOPK


def test_all_tokens_to_one_expert() -> None:
    layer = layer_of()
    to_one_expert(layer, 5)
    layer.router.tokens_per_expert.zero_()
    out, _ = layer(tokens())
    assert layer.router.tokens_per_expert[5] == SEQ * ROWS
    assert layer.router.tokens_per_expert.sum() == SEQ * ROWS * TOPK
    assert bool(out.isfinite().all()) and bool(out.abs().sum(-1).gt(0).all())


def test_order_of_tokens_does_not_matter() -> None:
    layer = layer_of()
    order = torch.randperm(SEQ, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(tokens()[order])[0], layer(tokens())[0][order], rtol=1e-12, atol=1e-12)


def test_order_of_experts_does_not_matter() -> None:
    """Renumbering experts, inside groups and groups among themselves, with their weights renames loads and no more."""
    layer = layer_of()
    with torch.no_grad():
        layer.router.expert_bias.copy_(torch.randn(EXPERTS, generator=torch.Generator().manual_seed(4)) * 0.1)
    layer.router.tokens_per_expert.zero_()
    before = layer(tokens())[0]
    loads = layer.router.tokens_per_expert.clone()
    order = torch.tensor([5, 4, 0, 1, 7, 6, 2, 3])  # four groups of two
    with torch.no_grad():
        layer.router.weight.copy_(layer.router.weight[order].clone())
        layer.router.expert_bias.copy_(layer.router.expert_bias[order].clone())
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[order].clone())
    layer.router.tokens_per_expert.zero_()
    torch.testing.assert_close(layer(tokens())[0], before, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.router.tokens_per_expert, loads[order])


def test_no_dropping_whatever_the_load() -> None:
    """Each token's weights add up to the scaling factor, however crowded its experts are."""
    layer = layer_of()
    to_one_expert(layer, 0)
    with torch.no_grad():
        layer.experts.fc2_weight.zero_()
        layer.experts.fc2_bias.fill_(1.0)
    torch.testing.assert_close(layer(tokens())[0], torch.full((SEQ, ROWS, HIDDEN), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("mask", [None, torch.arange(SEQ).expand(ROWS, SEQ) >= 9], ids=["full", "padded"])
def test_equals_upstreams_way_over_a_dispatcher(dispatcher: str, mask: Tensor | None) -> None:
    """Value and every gradient in fp64, the router's from its balance loss included."""
    ours = layer_of(moe_aux_loss_coeff=0.1)
    config = copy.copy(ours.config)
    config.moe_token_dispatcher_type = dispatcher
    spec = layer_spec(config, 2).submodules.mlp
    theirs = spec.module(config, spec.submodules, layer_number=2, pg_collection=get_default_pg_collection())
    theirs.double().train().load_state_dict(ours.state_dict())
    found = []
    for layer, run in ((ours, VPMoELayer.forward), (theirs, MoELayer.forward)):
        x = tokens().requires_grad_()
        out = run(layer, x, padding_mask=mask)[0]
        found.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], tokens(2))])
        found[-1] += [layer.router.tokens_per_expert, layer.router.balance_loss_sum]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_a_pass_asks_the_device_for_nothing_and_has_fixed_shapes() -> None:
    """Forward and backward on fake tensors in bf16, as a GPU computes them: a value asked for raises."""
    cfg = tiny_config(bf16=True, moe_shared_expert_intermediate_size=48)
    config = transformer_config(cfg)
    spec = layer_spec(config, 2).submodules.mlp
    with FakeTensorMode():
        layer = spec.module(config, spec.submodules, layer_number=2, pg_collection=get_default_pg_collection()).train()
        x = torch.randn(SEQ, ROWS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
            patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # else products are made in fp32
            out, _ = layer(x, padding_mask=torch.zeros(ROWS, SEQ, dtype=torch.bool))
            out.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


def test_a_pass_repeats_bit_for_bit() -> None:
    layer = layer_of().float()
    x, found = tokens().float(), []
    for _ in range(2):
        inputs = x.clone().requires_grad_()
        out, _ = layer(inputs)
        found.append([out, *torch.autograd.grad(out.square().sum(), [inputs, *layer.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
