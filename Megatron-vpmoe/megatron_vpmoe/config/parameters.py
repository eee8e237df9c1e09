"""Every parameter of a configuration's model by name, with its elements; and which of them a run trains.

By arithmetic alone, so that a pattern without a match is found before any process starts. Names are those of
``VPModel.named_parameters``, checkpoints and assignment.json: layers are counted from 0 over all pipeline stages.
"""

from __future__ import annotations

import fnmatch
import functools
from dataclasses import dataclass, field

from megatron_vpmoe.config.schema import RunConfig
from megatron_vpmoe.config.schema_model import ModelSection, MoeSection

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
ROUTED = ".mlp.experts."
OF_MIXED_EXPERTS = "decoder.experts."  # of a mixture
KEPT_FP32 = (".sink", ".grape_log_freq", ".value_residual_scale", ".A_log", ".D", ".dt_bias")  # in a bf16 model


def parameter_sizes(cfg: RunConfig, layers: range | None = None) -> dict[str, int]:
    """Name -> elements, experts of all ranks together.

    Args:
        cfg: the run; its tensor-parallel size plays no part (see ``geometry.tensor_parallel_rank``).
        layers: those of the pipeline stage of these layer numbers (from 1) alone; None: the whole model. The copy of a
            tied embedding on the last of several stages is listed under the embedding's name.
    """
    if cfg.model.layer_type == "mixture":
        return mixture_sizes(cfg)
    layers = range(1, cfg.model.num_layers + 1) if layers is None else layers
    hashable = cfg.model.model_copy(update={"mixture_experts": None})  # which no other model reads
    return dict(_sizes(_Asked(hashable, cfg.moe, layers, cfg)))


@dataclass(frozen=True)
class _Asked:
    """What sizes depend on; a planner asks for the same ones with every layout."""

    model: ModelSection
    moe: MoeSection
    layers: range
    cfg: RunConfig = field(compare=False)


@functools.lru_cache(maxsize=64)
def _sizes(asked: _Asked) -> dict[str, int]:
    cfg, m, layers = asked.cfg, asked.model, asked.layers
    is_first, is_last = layers.start == 1, layers.stop == m.num_layers + 1
    vocabulary = m.padded_vocab_size * m.hidden_size
    sizes: dict[str, int] = {EMBEDDING: vocabulary} if is_first else {}
    for number in layers:
        prefix = f"decoder.layers.{number - 1}."
        if m.layer_type == "state_space":
            sizes[prefix + "input_layernorm.weight"] = m.hidden_size
            sizes |= {f"{prefix}mixer.{name}": size for name, size in state_space_sizes(cfg).items()}
            continue
        inside = {"input_layernorm.weight": m.hidden_size, "pre_mlp_layernorm.weight": m.hidden_size}
        inside |= {f"self_attention.{name}": size for name, size in attention_sizes(cfg, number).items()}
        inside |= {f"mlp.{name}": size for name, size in _mlp_sizes(cfg, number).items()}
        if m.layer_type == "denoiser":
            inside |= _linear_sizes("level_modulation", m.hidden_size, 6 * m.hidden_size, True)
        sizes |= {prefix + name: size for name, size in inside.items()}
    if is_last:
        sizes["decoder.final_layernorm.weight"] = m.hidden_size
        if m.layer_type == "denoiser":
            h = m.hidden_size
            sizes |= _linear_sizes("decoder.final_modulation", h, 2 * h, True) | {"decoder.estimate.weight": h * h}
        sizes[OUTPUT if m.untie_embeddings_and_output_weights else EMBEDDING] = vocabulary
    return sizes


def attention_sizes(cfg: RunConfig, layer_number: int) -> dict[str, int]:
    """Name inside the attention of layer ``layer_number`` (from 1) -> elements; QK-norms and scalars included."""
    m = cfg.model
    heads, head_dim = m.num_attention_heads, m.kv_channels
    sizes: dict[str, int] = {}
    if m.softmax_type == "learnable":
        sizes["sink"] = heads
    if cfg.position_embedding(layer_number) == "grape_m":
        sizes["grape_log_freq"] = head_dim // 2
    if m.value_residual and layer_number > 1:
        sizes["value_residual_scale"] = 1
    biased = {"linear_qkv": m.add_qkv_bias, "linear_tpa_a": m.tpa_factor_bias, "linear_tpa_b": False}
    for name, rows in projection_rows(cfg, layer_number).items():
        sizes |= _linear_sizes(name, m.hidden_size, rows, biased[name])
    if cfg.is_tpa_layer(layer_number) and m.add_qkv_bias:
        sizes["qkv_bias"] = (heads + 2 * m.num_query_groups) * head_dim
    if m.qk_layernorm:
        sizes |= {"q_layernorm.weight": head_dim, "k_layernorm.weight": head_dim}
    return sizes | _linear_sizes("linear_proj", heads * head_dim, m.hidden_size, m.add_bias_linear)


def state_space_sizes(cfg: RunConfig) -> dict[str, int]:
    """Name inside the mixer of a state space layer -> elements."""
    m = cfg.model
    inner, states, rank = m.ssm_inner_size, m.ssm_state_size, m.ssm_step_rank
    return {
        "conv_weight": inner * m.ssm_conv_size,
        "conv_bias": inner,
        "dt_bias": inner,
        "A_log": states * inner,
        "D": inner,
        "in_proj.weight": 2 * inner * m.hidden_size,
        "x_proj.weight": (rank + 2 * states) * inner,
        "dt_proj.weight": inner * rank,
        "out_proj.weight": m.hidden_size * inner,
    }


def mixture_sizes(cfg: RunConfig) -> dict[str, int]:
    """Name -> elements of a mixture: attention, router, adapters, experts, and the embedding that they share."""
    m = cfg.model
    h, inner = m.hidden_size, m.num_attention_heads * m.kv_channels
    latent, rotated = m.kv_lora_rank, m.qk_pos_emb_head_dim
    attention = {
        "input_layernorm": h,
        "linear_query": (inner + m.num_attention_heads * rotated) * h,
        "linear_latent": latent * h,
        "linear_rope_key": rotated * h,
        "latent_layernorm": latent,
        "linear_key": inner * latent,
        "linear_value": inner * latent,
        "linear_proj": h * inner,
        **({} if m.memory_entries is None else {"linear_memory": latent * h}),
    }
    experts = m.mixture_experts or ()
    sizes = {f"decoder.latent_attention.{name}.weight": size for name, size in attention.items()}
    sizes["decoder.router.weight"] = len(experts) * h
    for expert in experts:
        sizes[f"decoder.adapters.{expert.label}.weight"] = h * h
        for name, size in parameter_sizes(cfg.of_expert(expert)).items():
            sizes[in_mixture(expert.layer_type, name)] = size
    return sizes


def in_mixture(layer_type: str, name: str) -> str:
    """What a parameter of an expert is called in a mixture that has an expert of this kind; the embedding is shared."""
    if name == EMBEDDING:
        return name
    stack = "" if layer_type == "denoiser" else "stack."
    return f"{OF_MIXED_EXPERTS}{layer_type}.{stack}{name.removeprefix('decoder.')}"


def projection_rows(cfg: RunConfig, layer_number: int) -> dict[str, int]:
    """Output rows of the matrices that make q, k and v, by name."""
    m = cfg.model
    heads, groups = m.num_attention_heads, m.num_query_groups
    if cfg.is_tpa_layer(layer_number):
        return {
            "linear_tpa_a": heads * m.tpa_q_rank + 2 * groups * m.tpa_rank,
            "linear_tpa_b": (m.tpa_q_rank + 2 * m.tpa_rank) * m.kv_channels,
        }
    return {"linear_qkv": (heads + 2 * groups) * m.kv_channels}


def feed_forward_sizes(cfg: RunConfig, width: int) -> dict[str, int]:
    """Name inside a feed-forward network of inner width ``width`` -> elements; SwiGLU's first matrix is twice that."""
    m = cfg.model
    inner = 2 * width if m.activation == "swiglu" else width
    return _linear_sizes("linear_fc1", m.hidden_size, inner, m.add_bias_linear) | _linear_sizes(
        "linear_fc2", width, m.hidden_size, m.add_bias_linear
    )


def _mlp_sizes(cfg: RunConfig, layer_number: int) -> dict[str, int]:
    m, moe = cfg.model, cfg.moe
    if not cfg.is_moe_layer(layer_number):
        return feed_forward_sizes(cfg, m.ffn_hidden_size)
    experts = moe.num_experts or 0
    sizes = {"router.weight": experts * m.hidden_size}
    for name, size in feed_forward_sizes(cfg, moe.moe_ffn_hidden_size).items():
        sizes["experts." + name.removeprefix("linear_").replace(".", "_")] = experts * size
    if shared := moe.moe_shared_expert_intermediate_size:
        sizes |= {f"shared_experts.{name}": size for name, size in feed_forward_sizes(cfg, shared).items()}
    return sizes


def _linear_sizes(name: str, inputs: int, outputs: int, bias: bool) -> dict[str, int]:
    return {f"{name}.weight": inputs * outputs, **({f"{name}.bias": outputs} if bias else {})}


def is_trained(cfg: RunConfig, name: str) -> bool:
    """Whether ``training.train_only`` leaves the parameter ``name`` trainable; without it everything is."""
    patterns = cfg.training.train_only
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
