"""HF's Qwen3 and ours: the same model under two layouts.

Megatron interleaves queries, keys and values per group in one matrix (``linear_qkv``: of each group its P = H / G
queries, then its key, then its value) and stacks a gated feed-forward's gate over its up projection (``linear_fc1``);
HF keeps them apart. Everything else is a renaming. Rows beyond HF's vocabulary hold the mean embedding: their logit is
the mean of all logits, so no greedy choice changes.

Shapes: H heads, G groups, P heads a group, D head dim, h hidden, V rows of HF's embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from vpmoe.errors import WeightsError
from vpmoe.hf.source_checks import EMBEDDING, OUTPUT, HFConfig, validated
from vpmoe.weights.heads import join_heads, split_heads
from vpmoe.weights.tensors import LazyTensor, Weights, cut, padded, part

ARCHITECTURE = "Qwen3ForCausalLM"
_EMBEDDING = (EMBEDDING, "embedding.word_embeddings.weight")
_OUTPUT = (OUTPUT, "output_layer.weight")
_FINAL_NORM = ("model.norm.weight", "decoder.final_layernorm.weight")
# Inside a layer: HF's name, ours.
_RENAMED = (
    ("input_layernorm.weight", "input_layernorm.weight"),
    ("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
    ("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
    ("self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
    ("post_attention_layernorm.weight", "pre_mlp_layernorm.weight"),
    ("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
)
_QKV = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
_GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
# Our fields that have one value in every Qwen3.
_FIXED = {
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": True,
    "activation": "swiglu",
    "softmax_type": "vanilla",
    "window_size": None,
    "global_position_embedding": "rope",
    "tpa": False,
    "value_residual": False,
}


class _Rope(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    rope_theta: float | None = Field(default=None, gt=0)
    rope_type: Literal["default"] | None = None
    type: Literal["default"] | None = None


class _Config(HFConfig):
    model_type: Literal["qwen3"]
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    num_hidden_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    rms_norm_eps: float = 1e-6
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None


def geometry(config: Mapping[str, Any], *, source: str, padded_vocab_size: int | None = None) -> dict[str, Any]:
    """Our geometry of an HF configuration (``config.json`` as a mapping), for ``vpmoe.weights.geometry.config_of``.

    Args:
        config: HF's.
        source: its file, for messages.
        padded_vocab_size: rows of our embedding; None takes HF's.

    Raises:
        WeightsError: it is not a Qwen3, or one with a feature that ours has not; names every key that says so.
    """
    found = validated(_Config, config, source=source)
    rope = found.rope_parameters or found.rope_scaling or _Rope()
    model = {
        **_FIXED,
        "num_layers": found.num_hidden_layers,
        "hidden_size": found.hidden_size,
        "ffn_hidden_size": found.intermediate_size,
        "num_attention_heads": found.num_attention_heads,
        "num_query_groups": found.num_key_value_heads,
        "kv_channels": found.head_dim or found.hidden_size // found.num_attention_heads,
        "padded_vocab_size": padded_vocab_size or found.vocab_size,
        "untie_embeddings_and_output_weights": not found.tie_word_embeddings,
        "layernorm_epsilon": found.rms_norm_eps,
        "rotary_base": rope.rope_theta or found.rope_theta,
    }
    return {"model": model, "moe": {}}


def is_qwen3(cfg: RunConfig) -> bool:
    """Whether a geometry of ours is a Qwen3, which ``transformers`` runs without code of ours."""
    return cfg.moe.num_experts is None and all(getattr(cfg.model, key) == value for key, value in _FIXED.items())


def hf_config(cfg: RunConfig, *, vocab_size: int, dtype: torch.dtype, kept: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of a Qwen3 geometry of ours.

    Args:
        vocab_size: rows of HF's embedding.
        dtype: of the weights.
        kept: keys of the configuration that the weights came from and that ours has no word for (token ids, longest
            position); what the geometry decides is not taken from it.
    """
    m = cfg.model
    return {
        **kept,
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": m.hidden_size,
        "intermediate_size": m.ffn_hidden_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.num_query_groups,
        "head_dim": m.kv_channels,
        "rms_norm_eps": m.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rotary_base},
        "rope_theta": m.rotary_base,  # where readers before transformers 5 look
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "dtype": str(dtype).removeprefix("torch."),
    }


def to_megatron(weights: Weights, cfg: RunConfig, *, source: str) -> dict[str, LazyTensor]:
    """HF's tensors, those that ``cfg`` describes, under our names and in our layout.

    Raises:
        WeightsError: matrices that become one are not of one dtype.
    """
    m = cfg.model
    rows = m.padded_vocab_size
    ours = {_EMBEDDING[1]: padded(weights[_EMBEDDING[0]], rows), _FINAL_NORM[1]: weights[_FINAL_NORM[0]]}
    if m.untie_embeddings_and_output_weights:
        ours[_OUTPUT[1]] = padded(weights[_OUTPUT[0]], rows)
    for n in range(m.num_layers):
        theirs_prefix, prefix = f"model.layers.{n}.", f"decoder.layers.{n}."
        for theirs, name in _RENAMED:
            ours[prefix + name] = weights[theirs_prefix + theirs]
        qkv, gate_up = (
            {theirs_prefix + name: weights[theirs_prefix + name] for name in names} for names in (_QKV, _GATE_UP)
        )
        ours[f"{prefix}self_attention.linear_qkv.weight"] = _joined(
            qkv, lambda *heads: join_heads(*(rows.unflatten(0, (-1, m.kv_channels)) for rows in heads)), source
        )
        ours[f"{prefix}mlp.linear_fc1.weight"] = _joined(gate_up, lambda *both: torch.cat(both), source)
    return ours


def from_megatron(weights: Weights, cfg: RunConfig, *, vocab_size: int) -> dict[str, LazyTensor]:
    """Our tensors under HF's names and in HF's layout and order; rows from ``vocab_size`` on are left out."""
    m = cfg.model
    theirs = {_EMBEDDING[0]: cut(weights[_EMBEDDING[1]], vocab_size)}
    for n in range(m.num_layers):
        theirs_prefix, prefix = f"model.layers.{n}.", f"decoder.layers.{n}."
        for name, ours in _RENAMED:
            theirs[theirs_prefix + name] = weights[prefix + ours]
        qkv = weights[f"{prefix}self_attention.linear_qkv.weight"]
        for index, rows in enumerate((m.num_attention_heads, m.num_query_groups, m.num_query_groups)):
            theirs[theirs_prefix + _QKV[index]] = part(
                qkv,
                rows * m.kv_channels,
                lambda w, i=index: split_heads(w, m.num_attention_heads, m.num_query_groups)[i].flatten(0, 1),
            )
        fc1 = weights[f"{prefix}mlp.linear_fc1.weight"]
        for index, name in enumerate(_GATE_UP):
            theirs[theirs_prefix + name] = part(fc1, m.ffn_hidden_size, lambda w, i=index: w.chunk(2)[i])
    theirs[_FINAL_NORM[0]] = weights[_FINAL_NORM[1]]
    if m.untie_embeddings_and_output_weights:
        theirs[_OUTPUT[0]] = cut(weights[_OUTPUT[1]], vocab_size)
    return theirs


def _joined(named: Mapping[str, LazyTensor], join: Callable[..., Tensor], source: str) -> LazyTensor:
    parts = list(named.values())
    if len({tensor.dtype for tensor in parts}) > 1:
        raise WeightsError(
            "these become one matrix, and differ in dtype: "
            + ", ".join(f"{name} {tensor.dtype}" for name, tensor in named.items()),
            source=source,
            remedy="save the model in one dtype",
        )
    rows = sum(tensor.shape[0] for tensor in parts)
    return LazyTensor((rows, *parts[0].shape[1:]), parts[0].dtype, lambda: join(*(tensor.read() for tensor in parts)))
