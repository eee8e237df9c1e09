"""Latent attention against transformers' DeepseekV3Attention with the same weights: output and gradients."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from megatron_vpmoe.think.latent_attention import LatentAttention
from tests.think_parts import drawn, packed, part_config

LENGTH, HIDDEN, HEADS, DIM, ROPE, LATENT = 11, 32, 4, 8, 4, 12


def theirs_with_weights_of(ours: LatentAttention) -> tuple[Any, Any]:
    sizes: dict[str, Any] = dict(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=DIM,
        qk_rope_head_dim=ROPE,
        v_head_dim=DIM,
        rope_interleave=False,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": ours.config.rotary_base},
        attn_implementation="eager",
    )
    config = transformers.DeepseekV3Config(**sizes)
    theirs: Any = DeepseekV3Attention(config, 0).double()
    key, value = (one.weight.unflatten(0, (HEADS, DIM)) for one in (ours.linear_key, ours.linear_value))
    with torch.no_grad():
        theirs.q_proj.weight.copy_(ours.linear_query.weight)
        theirs.kv_a_proj_with_mqa.weight.copy_(torch.cat([ours.linear_latent.weight, ours.linear_rope_key.weight]))
        theirs.kv_a_layernorm.weight.copy_(ours.latent_layernorm.weight)
        theirs.kv_b_proj.weight.copy_(torch.cat([key, value], 1).flatten(0, 1))
        theirs.o_proj.weight.copy_(ours.linear_proj.weight)
    return theirs, DeepseekV3RotaryEmbedding(config)


def test_output_and_gradients() -> None:
    torch.manual_seed(0)
    ours = drawn(LatentAttention(part_config(), latent_width=LATENT, rope_width=ROPE))
    theirs, rotary = theirs_with_weights_of(ours)
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    layout = packed(LENGTH)
    mine = torch.cat([ours(row.unsqueeze(0), layout) for row in x])

    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1).expand(2, 1, -1, -1)
    normed = ours.input_layernorm(x)
    angles = rotary(x, layout.position)
    attended, _ = theirs(normed, position_embeddings=angles, attention_mask=mask)
    torch.testing.assert_close(mine, x + attended, rtol=1e-6, atol=1e-6)

    cotangent = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    of_input, of_queries, of_output = torch.autograd.grad(
        mine, [x, ours.linear_query.weight, ours.linear_proj.weight], cotangent
    )
    expected = torch.autograd.grad(x + attended, [x, theirs.q_proj.weight, theirs.o_proj.weight], cotangent)
    for found, wanted in zip((of_input, of_queries, of_output), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
