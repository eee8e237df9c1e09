"""Our Qwen3 variant against transformers' Qwen3ForCausalLM with the same weights: QK-norm, RoPE, GQA, SwiGLU, tying."""

from __future__ import annotations

import pytest
import torch
import transformers
from student_cases import QWEN3, packed, random_tokens
from torch import Tensor

from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

VOCAB, LENGTH, LAYERS = 64, 45, 4
# (query heads, KV groups, head dim): the shape of Qwen3-0.6B, then others; the width of the heads need not be hidden's.
SHAPES = [(16, 8, 128), (4, 2, 8), (4, 4, 16), (6, 1, 10)]


def qwen3(heads: int, groups: int, dim: int, *, tied: bool) -> torch.nn.Module:
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=dim,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large weights: logits that are near zero would be equal whatever the layers do.
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 2 else 0.3))
    return model


def mixed_rows(query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """Megatron's mixed layout, group after group: its queries, its key, its value."""
    parts = zip(*(matrix.chunk(groups) for matrix in (query, key, value)), strict=True)
    return torch.cat([rows for group in parts for rows in group])


def translated(theirs: torch.nn.Module, groups: int) -> dict[str, Tensor]:
    """Our name -> their tensor."""
    state = theirs.state_dict()
    out = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        qkv = (state[f"{source}self_attn.{kind}_proj.weight"] for kind in "qkv")
        gate_up = [state[f"{source}mlp.{kind}_proj.weight"] for kind in ("gate", "up")]
        out |= {
            f"{target}input_layernorm.weight": state[f"{source}input_layernorm.weight"],
            f"{target}pre_mlp_layernorm.weight": state[f"{source}post_attention_layernorm.weight"],
            f"{target}self_attention.linear_qkv.weight": mixed_rows(*qkv, groups),
            f"{target}self_attention.linear_proj.weight": state[f"{source}self_attn.o_proj.weight"],
            f"{target}self_attention.q_layernorm.weight": state[f"{source}self_attn.q_norm.weight"],
            f"{target}self_attention.k_layernorm.weight": state[f"{source}self_attn.k_norm.weight"],
            f"{target}mlp.linear_fc1.weight": torch.cat(gate_up),
            f"{target}mlp.linear_fc2.weight": state[f"{source}mlp.down_proj.weight"],
        }
    return out


def ours_with_weights_of(theirs: torch.nn.Module, heads: int, groups: int, dim: int, *, tied: bool) -> VPModel:
    shape = {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": dim}
    model = build_model(tiny_config(**{**QWEN3, **shape, "untie_embeddings_and_output_weights": not tied})).eval()
    weights = translated(theirs, groups)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
    assert set(weights) == ({"output_layer.weight"} if tied else set()), "weights that our variant has no place for"
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "groups", "dim"), SHAPES)
def test_logits_and_gradients(heads: int, groups: int, dim: int, tied: bool) -> None:
    theirs = qwen3(heads, groups, dim, tied=tied)
    ours = ours_with_weights_of(theirs, heads, groups, dim, tied=tied)
    tokens = random_tokens(LENGTH, rows=2)
    layout = packed(LENGTH)
    layout = type(layout)(layout.document_id.expand(2, -1), layout.position.expand(2, -1))
    mine, reference = ours(tokens, layout).logits(), theirs(tokens).logits
    assert reference.std() > 0.3
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)

    cotangent = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    mine.backward(cotangent)
    reference.backward(cotangent)
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    expected = translated(theirs, groups)
    for name, parameter in ours.named_parameters():
        scale = expected[name].abs().max().item()
        assert (parameter.grad - expected[name]).abs().max().item() < 1e-4 * scale, name


def test_a_packed_row_is_each_document_alone_to_hf() -> None:
    heads, groups, dim = SHAPES[1]
    theirs = qwen3(heads, groups, dim, tied=True)
    ours = ours_with_weights_of(theirs, heads, groups, dim, tied=True)
    tokens = random_tokens(30)
    mine = ours(tokens, packed(11, 19)).logits()
    reference = torch.cat([theirs(tokens[:, :11]).logits, theirs(tokens[:, 11:]).logits], dim=1)
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)
