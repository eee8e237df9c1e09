"""Softmax top-k routing over SwiGLU experts against transformers' MixtralForCausalLM with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from student_cases import STUDENTS, packed, random_tokens
from test_hf_qwen3 import mixed_rows
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.router import VPMoERouter
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

VOCAB, LENGTH, LAYERS, HIDDEN, FFN = 64, 45, 3, 32, 16
HEADS, GROUPS, DIM = 4, 2, 8
COEFFICIENT = 0.3


def mixtral(experts: int, topk: int) -> transformers.MixtralForCausalLM:
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=DIM,
        num_local_experts=experts,
        num_experts_per_tok=topk,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        attn_implementation="eager",
        experts_implementation="eager",
    )
    config = transformers.MixtralConfig(**sizes)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.3))
    return model


def translated(theirs: torch.nn.Module) -> dict[str, Tensor]:
    """Our name -> their tensor; experts are one stack there as here."""
    state = theirs.state_dict()
    out = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    for layer in range(LAYERS):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        query, key, value = (state[f"{source}self_attn.{kind}_proj.weight"] for kind in "qkv")
        out |= {
            f"{target}input_layernorm.weight": state[f"{source}input_layernorm.weight"],
            f"{target}pre_mlp_layernorm.weight": state[f"{source}post_attention_layernorm.weight"],
            f"{target}self_attention.linear_qkv.weight": mixed_rows(query, key, value, GROUPS),
            f"{target}self_attention.linear_proj.weight": state[f"{source}self_attn.o_proj.weight"],
            f"{target}mlp.router.weight": state[f"{source}mlp.gate.weight"],
            f"{target}mlp.experts.fc1_weight": state[f"{source}mlp.experts.gate_up_proj"],
            f"{target}mlp.experts.fc2_weight": state[f"{source}mlp.experts.down_proj"],
        }
    return out


def ours_with_weights_of(theirs: torch.nn.Module, experts: int, topk: int) -> VPModel:
    changes = {
        **STUDENTS["Nano-MoE"],
        "num_layers": LAYERS,
        "num_experts": experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": FFN,
        "moe_shared_expert_intermediate_size": None,
        "moe_aux_loss_coeff": COEFFICIENT,
    }
    model, weights = build_model(tiny_config(**changes)), translated(theirs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights, "weights that our variant has no place for"
    return model.train()


@pytest.mark.parametrize(("experts", "topk"), [(4, 2), (8, 3)])
def test_logits_balance_loss_and_gradients(experts: int, topk: int) -> None:
    """Of one row of real tokens, for which theirs is K times ours: both count assignments, and ours are shares of K."""
    theirs = mixtral(experts, topk)
    ours = ours_with_weights_of(theirs, experts, topk)
    tokens = random_tokens(LENGTH)
    mine, reference = ours(tokens, packed(LENGTH)).logits(), theirs(tokens, output_router_logits=True)
    assert reference.logits.std() > 0.3
    torch.testing.assert_close(mine, reference.logits, rtol=1e-4, atol=1e-4)

    # Theirs is one loss over the assignments of all layers together: layer by layer it is the one of the papers.
    balance = torch.stack(
        [torch.as_tensor(load_balancing_loss_func((logits,), experts, topk)) for logits in reference.router_logits]
    )
    routers = [module for module in ours.modules() if isinstance(module, VPMoERouter)]
    counted = torch.stack([router.balance_loss_sum for router in routers])
    torch.testing.assert_close(counted / LENGTH, COEFFICIENT * balance / topk, rtol=1e-5, atol=1e-6)

    cotangent = torch.randn(reference.logits.shape, generator=torch.Generator().manual_seed(1))
    mine.backward(cotangent)
    # In training the step divides the balance loss's sum by the tokens; here it comes as it is summed.
    ((reference.logits * cotangent).sum() + LENGTH * COEFFICIENT / topk * balance.sum()).backward()
    for parameter in theirs.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    expected = translated(theirs)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        scale = expected[name].abs().max().item()
        assert scale > 0 and (parameter.grad - expected[name]).abs().max().item() < 1e-4 * scale, name
