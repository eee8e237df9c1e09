"""The student's own HF form: our names below ``model.``, and a configuration that says the same in HF's words.

No number changes on the way: an exported tensor is the checkpoint's, so importing it again gives the same bits. The
directory carries its code (``configuration_vpmoe``, ``layers_vpmoe``, ``modeling_vpmoe``) for ``trust_remote_code``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.config.schema import RENAMED, named_today
from vpmoe.errors import WeightsError
from vpmoe.hf.source_checks import EMBEDDING, OUTPUT, HFConfig, validated
from vpmoe.weights.tensors import LazyTensor, Weights, cut, padded

ARCHITECTURE = "VpMoeForCausalLM"
CODE = tuple(Path(__file__).parent / f"{name}_vpmoe.py" for name in ("configuration", "layers", "modeling"))
_AUTO_MAP = {
    "AutoConfig": "configuration_vpmoe.VpMoeConfig",
    "AutoModel": "modeling_vpmoe.VpMoeModel",
    "AutoModelForCausalLM": f"modeling_vpmoe.{ARCHITECTURE}",
}
_TABLES = (EMBEDDING, OUTPUT)
_RENAMED = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": OUTPUT,
}
_LAYERS = ("decoder.layers.", "model.layers.")
# Ours -> HF's, section by section.
_MODEL_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "activation": "activation",
    "add_bias_linear": "linear_bias",
    "add_qkv_bias": "qkv_bias",
    "qk_layernorm": "qk_norm",
    "softmax_type": "softmax_type",
    "window_size": "window_size",
    "window_attn_skip_freq": "window_attn_skip_freq",
    "local_position_embedding": "local_position_embedding",
    "global_position_embedding": "global_position_embedding",
    "rotary_base": "rotary_base",
    "grapem_log_freq_scale": "grapem_log_freq_scale",
    "tpa": "tpa",
    "tpa_rank": "tpa_rank",
    "tpa_q_rank": "tpa_q_rank",
    "tpa_factor_bias": "tpa_factor_bias",
    "value_residual": "value_residual",
    "init_method_std": "initializer_range",
}
_MOE_KEYS = {
    "num_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    "first_dense_layers": "first_dense_layers",
    "moe_router_score_function": "router_score_function",
    "moe_router_topk_scaling_factor": "router_scaling_factor",
    "moe_router_num_groups": "router_groups",
    "moe_router_group_topk": "router_group_topk",
    "moe_router_enable_expert_bias": "router_expert_bias",
    "moe_router_dtype": "router_dtype",
}
_ROUTER_DTYPES = {"fp32": "float32", "fp64": "float64", None: None}


def hf_config(cfg: RunConfig, *, vocab_size: int, dtype: torch.dtype, kept: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of any transformer of ours; arguments as for ``vpmoe.hf.qwen3.hf_config``.

    Raises:
        WeightsError: the layers are of another type, for which the directory's code has no modules.
    """
    if cfg.model.layer_type != "transformer":
        raise WeightsError(
            f"an HF directory has no modules for layers of type {cfg.model.layer_type}",
            source="model.layer_type",
            remedy="use the checkpoint itself: vpmoe sample, chat and eval take it",
        )
    model, moe = cfg.model.model_dump(mode="json"), cfg.moe.model_dump(mode="json")
    moe["moe_router_dtype"] = _ROUTER_DTYPES[moe["moe_router_dtype"]]
    return {
        **kept,
        "architectures": [ARCHITECTURE],
        "auto_map": dict(_AUTO_MAP),
        "model_type": "vpmoe",
        "vocab_size": vocab_size,
        **{theirs: model[ours] for ours, theirs in _MODEL_KEYS.items()},
        **{theirs: moe[ours] for ours, theirs in _MOE_KEYS.items()},
        "tie_word_embeddings": not cfg.model.untie_embeddings_and_output_weights,
        "dtype": str(dtype).removeprefix("torch."),
    }


def geometry(config: Mapping[str, Any], *, source: str, padded_vocab_size: int | None = None) -> dict[str, Any]:
    """Our geometry of an exported ``config.json``; arguments as for ``vpmoe.hf.qwen3.geometry``.

    Raises:
        WeightsError: a key is missing.
    """
    found = validated(HFConfig, config, source=source)
    config = {**config, **named_today("moe", {old: config[old] for old in RENAMED if old in config})}
    try:
        model = {ours: config[theirs] for ours, theirs in _MODEL_KEYS.items()}
        moe = {ours: config[theirs] for ours, theirs in _MOE_KEYS.items()}
        router = config["router_dtype"]
        moe["moe_router_dtype"] = next((ours for ours, name in _ROUTER_DTYPES.items() if name == router), router)
        model["untie_embeddings_and_output_weights"] = not found.tie_word_embeddings
        model["padded_vocab_size"] = padded_vocab_size or found.vocab_size
    except KeyError as error:
        raise WeightsError(f"{error} is missing", source=source, remedy="name a directory that was exported") from error
    return {"model": model, "moe": moe}


def to_megatron(weights: Weights, cfg: RunConfig, *, source: str) -> dict[str, LazyTensor]:
    """HF's names to ours; a tied model's ``lm_head`` is left out, and rows that ``cfg`` has beyond HF's are padding."""
    back = {theirs: ours for ours, theirs in _RENAMED.items()}
    rows, tied = cfg.model.padded_vocab_size, not cfg.model.untie_embeddings_and_output_weights
    return {
        _renamed(name, back, _LAYERS[::-1]): padded(tensor, rows) if name in _TABLES else tensor
        for name, tensor in weights.items()
        if not (tied and name == OUTPUT)
    }


def from_megatron(weights: Weights, cfg: RunConfig, *, vocab_size: int) -> dict[str, LazyTensor]:
    """Our names to HF's; rows from ``vocab_size`` on are left out."""
    theirs = {_renamed(name, _RENAMED, _LAYERS): tensor for name, tensor in weights.items()}
    return {name: cut(tensor, vocab_size) if name in _TABLES else tensor for name, tensor in theirs.items()}


def _renamed(name: str, exact: Mapping[str, str], prefixes: tuple[str, ...]) -> str:
    return exact[name] if name in exact else name.replace(prefixes[0], prefixes[1], 1)
