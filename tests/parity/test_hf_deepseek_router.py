"""Routing against transformers' DeepSeek-V3 router with the same weight and expert biases."""

from __future__ import annotations

import pytest
import torch
import transformers
from megatron.core.transformer.moe.moe_layer import get_default_pg_collection
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.model.transformer_config import transformer_config
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

HIDDEN, TOKENS = 32, 200


# transformers scores a group by its two best experts: ours by its topk / group_topk best, here two as well.
@pytest.mark.parametrize(("experts", "topk", "groups", "kept"), [(16, 4, 4, 2), (32, 8, 8, 4), (8, 2, 1, 1)])
def test_choice_weights_and_gradients(experts: int, topk: int, groups: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cfg = tiny_config(
        num_experts=experts, moe_router_topk=topk, moe_router_num_groups=groups, moe_router_group_topk=kept
    )
    ours = VPMoERouter(transformer_config(cfg), get_default_pg_collection()).eval()
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=experts,
        num_experts_per_tok=topk,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=True,
        routed_scaling_factor=cfg.moe.moe_router_topk_scaling_factor,
    )
    theirs = modeling.DeepseekV3TopkRouter(config)
    weight, bias = torch.randn(experts, HIDDEN, generator=generator), 0.3 * torch.randn(experts, generator=generator)
    for router, bias_name in ((ours, "expert_bias"), (theirs, "e_score_correction_bias")):
        router.weight.data.copy_(weight)
        getattr(router, bias_name).data.copy_(bias)
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator)

    probs, routing = ours(hidden)
    _, chosen_weights, chosen = theirs(hidden)
    expected = torch.zeros(TOKENS, experts).scatter(1, chosen, chosen_weights)
    assert torch.equal(routing, expected > 0)
    torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-6)
    _, without_bias = theirs(hidden)[1:]
    theirs.e_score_correction_bias.zero_()
    assert not torch.equal(without_bias, theirs(hidden)[2]), "the bias changes no choice: it is not tested"

    cotangent = torch.randn(TOKENS, experts, generator=generator)
    (mine,) = torch.autograd.grad(probs, ours.weight, cotangent)
    (reference,) = torch.autograd.grad(expected, theirs.weight, cotangent)
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)
