"""No field of the architecture is silently ignored: each changes the model, or the table of idle fields says not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.config.rules import find_problems, idle_fields
from megatron_vpmoe.config.schema import fields, section_types
from megatron_vpmoe.config.schema_model import MixtureExpert
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from tests.tiny import random_batch, tiny_config

# Another value of each field; where one alone would be refused, several.
OTHER: dict[str, list[Any]] = {
    "num_layers": [4, 2],
    "hidden_size": [48],
    "ffn_hidden_size": [56],
    "num_attention_heads": [8],
    "num_query_groups": [4, 2],
    "kv_channels": [16],
    "padded_vocab_size": [72],
    "untie_embeddings_and_output_weights": [True, False],
    "add_bias_linear": [True, False],
    "add_qkv_bias": [True, False],
    "qk_layernorm": [True, False],
    "layernorm_epsilon": [0.1],
    "activation": ["squared_relu", "swiglu"],
    "init_method_std": [0.3],
    "softmax_type": ["learnable", "vanilla"],
    "window_size": [3, None],
    "window_attn_skip_freq": [3],
    "local_position_embedding": ["grape_m", "grape_a", "rope", "none"],
    "global_position_embedding": ["grape_m", "grape_a", "rope", "none"],
    "rotary_base": [100.0],
    "grapem_log_freq_scale": [4.0],
    "tpa": [True, False],
    "tpa_rank": [3],
    "tpa_q_rank": [2],
    "tpa_factor_bias": [True, False],
    "value_residual": [True, False],
    "layer_type": ["transformer", "state_space"],
    "ssm_inner_size": [48],
    "ssm_state_size": [3],
    "ssm_conv_size": [2],
    "ssm_step_rank": [5],
    "diffusion_levels": [20],
    "ddim_steps": [3],
    "mixture_experts": [[MixtureExpert(layer_type=kind, num_layers=1) for kind in ("transformer", "denoiser")]],
    "kv_lora_rank": [20],
    "qk_pos_emb_head_dim": [8],
    "memory_entries": [2],
    "num_experts": [None, 16],
    "moe_router_topk": [2, 4],
    "moe_ffn_hidden_size": [32],
    "moe_shared_expert_intermediate_size": [32, None],
    "first_dense_layers": [0, 2],
    "moe_router_load_balancing_type": ["seq_aux_loss", "none"],
    "moe_aux_loss_coeff": [0.3],
    "moe_router_score_function": ["sigmoid", "softmax"],
    "moe_router_topk_scaling_factor": [1.0],
    "moe_router_num_groups": [2, 4],
    "moe_router_group_topk": [1],
    "moe_router_enable_expert_bias": [True, False],
}
# These choose how the same numbers are computed, or act after the backward pass; their own tests hold them.
ELSEWHERE = {
    "attention_backend",
    "experts_precision",
    "moe_router_dtype",
    "moe_router_bias_update_rate",
    "moe_token_dispatcher_type",
}
BASES: dict[str, dict[str, Any]] = {
    "vpMoE": {},
    "plain dense": {
        "num_experts": None,
        "window_size": None,
        "global_position_embedding": "rope",
        "tpa": False,
        "softmax_type": "vanilla",
        "value_residual": False,
    },
    "mixture": {
        **dict.fromkeys(("num_experts", "window_size")),
        "layer_type": "mixture",
        "mixture_experts": [
            {"layer_type": kind, "num_layers": 1} for kind in ("transformer", "state_space", "denoiser")
        ],
        "train_only": ["decoder.latent_attention.*", "decoder.router.*", "decoder.adapters.*"],
        **{"num_query_groups": 4, "global_position_embedding": "rope", "softmax_type": "vanilla"},
        **dict.fromkeys(("tpa", "value_residual", "qk_layernorm", "add_bias_linear", "add_qkv_bias"), False),
        **{"activation": "swiglu", "untie_embeddings_and_output_weights": False},
        **{"ssm_inner_size": 40, "ssm_step_rank": 3, "diffusion_levels": 10, "ddim_steps": 2},
    },
    "state space": {"num_experts": None, "layer_type": "state_space", "ssm_inner_size": 40, "ssm_step_rank": 3},
    "all local, all sparse": {
        "window_attn_skip_freq": 9,
        "local_position_embedding": "grape_a",
        "tpa": False,
        "first_dense_layers": 0,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_router_enable_expert_bias": False,
    },
}


def base_config(**changes: Any) -> RunConfig:
    shape = {"num_layers": 3, "window_size": 4, "window_attn_skip_freq": 2, "seq_length": 24, "init_method_std": 0.2}
    return tiny_config(**{**shape, "moe_aux_loss_coeff": 0.1, "moe_router_topk": 4, **changes})


def replaced(cfg: RunConfig, name: str, value: Any) -> RunConfig:
    section = fields()[name].section
    return cfg.model_copy(update={section: getattr(cfg, section).model_copy(update={name: value})})


def fingerprint(cfg: RunConfig) -> Iterator[dict[str, Any]]:
    """From seed 0 the parameters' shapes, the loss, and every gradient, each computed when it is asked for."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    yield {name: parameter.shape for name, parameter in model.named_parameters()}
    batch = random_batch(2, cfg.data.seq_length, 64, seed=0)
    output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    even = torch.full(batch.labels.shape, 1.0 / int(batch.loss_mask.sum()))
    loss, _ = output.cross_entropy(batch.labels, batch.loss_mask, even)
    yield {"loss": loss.detach(), "expert bias": expert_bias(model)}
    loss.backward()
    yield {name: p.grad for name, p in model.named_parameters()}


def expert_bias(model: torch.nn.Module) -> torch.Tensor | None:
    return next((b for name, b in model.named_buffers() if name.endswith("expert_bias")), None)


def equal(one: Iterable[dict[str, Any]], other: Iterable[dict[str, Any]]) -> bool:
    return all(
        mine.keys() == theirs.keys() and all(map(same, mine.values(), theirs.values()))
        for mine, theirs in zip(one, other, strict=True)
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b if a is None or b is None else a == b


def test_every_field_of_the_architecture_is_looked_at() -> None:
    sections = section_types()
    architecture = {*sections["model"].model_fields, *sections["moe"].model_fields}
    assert architecture == OTHER.keys() | ELSEWHERE


@pytest.mark.parametrize("name", BASES)
def test_a_field_acts_or_is_declared_idle(name: str, single_process: None) -> None:
    cfg = base_config(**BASES[name])
    before, idle = [*fingerprint(cfg)], idle_fields(cfg)
    assert equal(before, fingerprint(cfg)), "the same configuration gives the same numbers"
    for field, values in OTHER.items():
        current = getattr(getattr(cfg, fields()[field].section), field)
        others = [replaced(cfg, field, value) for value in values if value != current]
        assert others, field
        for other in others:
            if find_problems(other) == []:
                assert equal(before, fingerprint(other)) == (field in idle), (field, idle.get(field))


def test_what_is_idle_where() -> None:
    moe = set(section_types()["moe"].model_fields) - {"num_experts"}
    dense = set(idle_fields(base_config(**BASES["plain dense"])))
    assert moe < dense and {"window_attn_skip_freq", "local_position_embedding", "tpa_rank"} < dense
    of_state_space = {"ssm_inner_size", "ssm_state_size", "ssm_conv_size", "ssm_step_rank"}
    of_denoiser = {"diffusion_levels", "ddim_steps"}
    of_mixture = {"mixture_experts", "kv_lora_rank", "qk_pos_emb_head_dim", "memory_entries"}
    assert set(idle_fields(base_config())) == of_state_space | of_denoiser | of_mixture
    assert not set(idle_fields(base_config(**BASES["mixture"]))) & (of_state_space | of_denoiser | of_mixture)
    mixers = set(idle_fields(base_config(**BASES["state space"])))
    assert (
        of_state_space.isdisjoint(mixers) and {"num_attention_heads", "activation", "tpa", "ffn_hidden_size"} < mixers
    )
    local = set(idle_fields(base_config(**BASES["all local, all sparse"])))
    positions = {"global_position_embedding", "rotary_base", "grapem_log_freq_scale"}
    factors = {"tpa_rank", "tpa_q_rank", "tpa_factor_bias"}
    routing = {"moe_aux_loss_coeff", "moe_router_bias_update_rate", "moe_router_num_groups"}
    assert local == positions | factors | routing | of_state_space | of_denoiser | of_mixture | {"ffn_hidden_size"}
