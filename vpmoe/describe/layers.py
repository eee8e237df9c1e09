"""Layers in words, and those of a stack that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_vpmoe.config import LayerGeometry, RunConfig
from megatron_vpmoe.config.layer_geometry import LATENT_ATTENTION

POSITION_NAMES = {"grape_m": "GRAPE-M", "grape_a": "GRAPE-A", "rope": "RoPE", "none": "none"}
ACTIVATION_NAMES = {"squared_relu": "ReLU²", "swiglu": "SwiGLU"}


def amount(count: float) -> str:
    """Three digits and a unit: 6.02 B, 781 M, 879 K."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def kind_words(layer: LayerGeometry) -> str:
    """Local with its window, or global; or a state space; of a mixture the part that it is of."""
    if layer.part:
        return layer.part.replace("_", " ")
    if layer.state_size is not None:
        return "state space"
    return "global" if layer.window is None else f"local {layer.window}"


def attention_words(cfg: RunConfig, layer: LayerGeometry) -> str:
    """The projections: tensor-product with its ranks, or grouped-query; or the mixer in their place; or a latent."""
    if layer.part == LATENT_ATTENTION:
        return f"latent {cfg.model.kv_lora_rank}+{cfg.model.qk_pos_emb_head_dim}"
    if layer.state_size is not None:
        return f"S6 {cfg.model.ssm_inner_size}"
    return f"TPA {cfg.model.tpa_q_rank}/{cfg.model.tpa_rank}" if layer.tensor_product else "GQA"


def feed_forward_words(cfg: RunConfig, layer: LayerGeometry) -> str:
    """Dense with its width, or how many experts of how many a token visits; a state space layer has none."""
    if layer.state_size is not None:
        return "none"
    if layer.part == LATENT_ATTENTION:
        return "router, adapters"
    if not layer.sparse:
        return f"dense {cfg.model.ffn_hidden_size}"
    return f"MoE {cfg.moe.moe_router_topk}/{cfg.moe.num_experts}"


def legend(cfg: RunConfig, layers: Sequence[LayerGeometry]) -> list[tuple[str, str]]:
    """What the short words stand for, of those that occur: (word, meaning)."""
    m, moe, activation = cfg.model, cfg.moe, ACTIVATION_NAMES[cfg.model.activation]
    if m.layer_type == "state_space":
        mixer = f"{m.hidden_size} -> 2 x {m.ssm_inner_size} -> {m.hidden_size}, convolution of {m.ssm_conv_size}, "
        mixer += f"{m.ssm_state_size} numbers of state a channel, step of rank {m.ssm_step_rank}"
        return [("S6", mixer), ("state", f"{layers[0].state_size:,} numbers a layer and text, however long it is")]
    if m.layer_type == "mixture":
        mixed = " + ".join(f"{one.num_layers} x {one.layer_type}" for one in m.mixture_experts or ())
        lines = [("mixture", f"{mixed}, frozen, by the weights of a router over a document's running mean")]
        if "denoiser" in {one.layer_type for one in m.mixture_experts or ()}:
            lines.append(("denoiser", f"runs for the clean tokens, and for each of {m.ddim_steps} steps of DDIM"))
        return lines
    sink = ", softmax with sink" if m.softmax_type == "learnable" else ""
    heads = f"{m.num_attention_heads} query heads, {m.num_query_groups} key/value heads of {m.kv_channels}{sink}"
    lines = [("attention", heads)]
    if m.layer_type == "denoiser":
        lines.append(
            ("denoiser", f"{m.diffusion_levels} levels of noise; clean tokens and noisy ones go through all layers")
        )
    if any(layer.tensor_product for layer in layers):
        lines.append(("TPA", f"rank {m.tpa_q_rank} for queries, {m.tpa_rank} for keys and for values"))
    if m.value_residual:
        lines.append(("values", "layer 1's are mixed into every later layer"))
    if any(not layer.sparse for layer in layers):
        lines.append(("dense", f"{m.hidden_size} -> {m.ffn_hidden_size} -> {m.hidden_size}, {activation}"))
    if any(layer.sparse for layer in layers):
        shared = moe.moe_shared_expert_intermediate_size
        routed = f"{moe.moe_router_topk} of {moe.num_experts} experts of {moe.moe_ffn_hidden_size}, {activation}"
        lines.append(("MoE", routed + (f"; beside them a shared one of {shared}" if shared else "")))
    return lines


def alike(layer: LayerGeometry) -> LayerGeometry:
    """The layer without its number: equal for layers that are built and cost alike."""
    return replace(layer, number=0)


def kinds(layers: Sequence[LayerGeometry]) -> list[list[LayerGeometry]]:
    """The layers that are alike, kind by kind, in the order of their first ones."""
    found: dict[LayerGeometry, list[LayerGeometry]] = {}
    for layer in layers:
        found.setdefault(alike(layer), []).append(layer)
    return list(found.values())


def numbers_of(members: Sequence[LayerGeometry]) -> str:
    """Which layers: "1", "2-3, 5-7, ..., 77-79"."""
    numbers = [layer.number for layer in members]
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(spans if len(spans) <= 3 else [*spans[:2], "...", spans[-1]])
