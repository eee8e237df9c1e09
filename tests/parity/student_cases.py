"""Tiny students of every rung, with weights that leave nothing at a neutral value, for the parity tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from ref.model import Student
from tests.tiny import tiny_config

VOCAB = 64

DENSE = {"num_experts": None}
SHAPE_ONLY = {
    **DENSE,
    "window_size": None,
    "tpa": False,
    "softmax_type": "vanilla",
    "value_residual": False,
    "global_position_embedding": "rope",
}
QWEN3 = {
    **SHAPE_ONLY,
    "activation": "swiglu",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": False,
}
# Name -> overrides of the tiny vpMoE: the rungs of the ladder, then single parts switched.
STUDENTS: dict[str, dict[str, Any]] = {
    "vpMoE": {},
    "vpDense full": DENSE,
    "vpDense shape only": SHAPE_ONLY,
    "Qwen3": QWEN3,
    "six heads, three groups, no power of two": {
        **DENSE,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "tpa_rank": 1,
        "tpa_q_rank": 3,
    },
    "global layers without positions": {
        **DENSE,
        "window_size": None,
        "tpa": False,
        "global_position_embedding": "none",
    },
    "RoPE in windows, no biases, no QK-norm": {
        **DENSE,
        "local_position_embedding": "rope",
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "tpa_factor_bias": False,
        "qk_layernorm": False,
    },
    "softmax router, no groups, no shared expert, all layers sparse": {
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_shared_expert_intermediate_size": None,
        "first_dense_layers": 0,
    },
    "Nano-MoE": {
        **QWEN3,
        "num_experts": 4,
        "qk_layernorm": False,
        "first_dense_layers": 0,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": 1.0,
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
    },
    "gated experts with biases, two dense layers": {"activation": "swiglu", "first_dense_layers": 2},
}


def student_of(cfg: RunConfig) -> Student:
    """The reference's description of a configuration."""
    m, moe = cfg.model, cfg.moe
    groups, kept = moe.moe_router_num_groups, moe.moe_router_group_topk
    return Student(
        layers=m.num_layers,
        heads=m.num_attention_heads,
        groups=m.num_query_groups,
        head_dim=m.kv_channels,
        epsilon=m.layernorm_epsilon,
        window=m.window_size,
        global_every=m.window_attn_skip_freq,
        local_positions=m.local_position_embedding,
        global_positions=m.global_position_embedding,
        rotary_base=m.rotary_base,
        frequency_scale=m.grapem_log_freq_scale,
        tpa_ranks=(m.tpa_q_rank, m.tpa_rank) if m.tpa else None,
        tpa_factor_bias=m.tpa_factor_bias,
        qkv_bias=m.add_qkv_bias,
        linear_bias=m.add_bias_linear,
        qk_norm=m.qk_layernorm,
        sink=m.softmax_type == "learnable",
        value_residual=m.value_residual,
        gated=m.activation == "swiglu",
        tied=not m.untie_embeddings_and_output_weights,
        experts=moe.num_experts,
        first_dense_layers=moe.first_dense_layers,
        topk=moe.moe_router_topk,
        router_groups=None if groups is None or kept is None else (groups, kept),
        router_softmax=moe.moe_router_score_function == "softmax",
        router_scale=moe.moe_router_topk_scaling_factor,
        expert_bias=moe.moe_router_enable_expert_bias,
        shared_expert=moe.moe_shared_expert_intermediate_size is not None,
        balance_coefficient=moe.moe_aux_loss_coeff if moe.moe_router_load_balancing_type == "seq_aux_loss" else 0.0,
    )


def lively_model(dtype: torch.dtype = torch.float32, **changes: Any) -> VPModel:
    """A model whose sinks, biases, norms, mixes and frequencies are off their initial values: all take part."""
    model = build_model(tiny_config(**changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise, last = torch.randn(tensor.shape, generator=generator), name.rsplit(".", 1)[-1]
            if last in ("tokens_per_expert", "local_tokens_per_expert", "balance_loss_sum"):
                continue
            if last == "value_residual_scale":
                tensor.add_(-0.4 + 0.2 * noise)
            elif last == "grape_log_freq":
                tensor.add_(noise)
            elif last == "expert_bias":
                tensor.add_(0.1 * noise)
            elif tensor.dim() < 2 or "bias" in last:
                tensor.add_(0.3 * noise)
            else:
                tensor.mul_(4)
    return model.to(dtype)


def packed(*lengths: int, padding: int = 0) -> SequenceLayout:
    """One row of documents of these lengths, then padding."""
    ids = [document for document, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    positions = [t for length in lengths for t in range(length)] + [0] * padding
    return SequenceLayout(torch.tensor([ids], dtype=torch.int32), torch.tensor([positions]))


def random_tokens(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    """int64 [rows, length]."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
