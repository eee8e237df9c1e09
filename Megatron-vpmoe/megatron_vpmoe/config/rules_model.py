"""Rules of the architecture: which choices no model is built for, and which fields are idle beside others.

A feature that is switched on and could never act is refused; a size or kind that belongs to a feature which is off is
idle, and `vpmoe model describe` lists it. A test walks the grid of all choices.
"""

from __future__ import annotations

from megatron_vpmoe.config.expert_formats import FORMATS
from megatron_vpmoe.config.rule import Rule, View, idle, refuse, twice
from megatron_vpmoe.config.schema import section_types

_SCHEDULE = "window_size window_attn_skip_freq"
_GROUPS = "moe_router_num_groups moe_router_group_topk"


def _groups_too_small(c: View) -> bool:
    if not c.grouped or c.moe_router_group_topk > c.moe_router_num_groups:
        return False
    held = c.moe_router_group_topk * (c.num_experts // c.moe_router_num_groups)
    return c.moe_router_topk % c.moe_router_group_topk == 0 and c.moe_router_topk > held


def _outside_format(c: View) -> list[dict[str, int]]:
    if c.num_experts is None or c.experts_precision is None:
        return []
    block = FORMATS[c.experts_precision].block
    return [{"block": block}] if c.hidden_size % block or c.moe_ffn_hidden_size % block else []


def _unaligned(c: View) -> bool:
    width = 8 if c.bf16 else 4
    return c.num_experts is not None and bool(c.hidden_size % width or c.moe_ffn_hidden_size % width)


_PLAIN = ("denoiser", "mixture")

_OF_DENOISER: dict[str, object] = {
    "num_experts": None,
    "window_size": None,
    "activation": "swiglu",
    "softmax_type": "vanilla",
    "global_position_embedding": "rope",
    **dict.fromkeys(("value_residual", "qk_layernorm", "add_bias_linear", "add_qkv_bias"), False),
    "untie_embeddings_and_output_weights": False,
}


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()


REFUSED: tuple[Rule, ...] = (
    *(
        refuse(
            f"layer_type {name}",
            f"a {{layer_type}} is built of plain layers and has no output layer; set {name} to {_yaml(plain)}",
            lambda c, name=name, plain=plain: c.layer_type in _PLAIN and c[name] != plain,
        )
        for name, plain in _OF_DENOISER.items()
    ),
    refuse(
        "layer_type num_query_groups num_attention_heads",
        "a {layer_type}'s heads have keys of their own; set num_query_groups to {num_attention_heads}",
        lambda c: c.layer_type in _PLAIN and c.num_query_groups != c.num_attention_heads,
    ),
    refuse(
        "layer_type ddim_steps diffusion_levels",
        "{ddim_steps} steps do not fit into {diffusion_levels} levels; lower the steps",
        lambda c: "denoiser" in c.layer_types and c.ddim_steps > c.diffusion_levels,
    ),
    refuse(
        "layer_type mixture_experts",
        "a mixture has no experts to mix; name at least two as {{layer_type, num_layers}}",
        lambda c: c.layer_type == "mixture" and len(c.mixture_experts or ()) < 2,
    ),
    refuse(
        "layer_type mixture_experts",
        "a mixture has one expert of a kind, and {twice} is there several times; leave one",
        lambda c: c.layer_type == "mixture" and twice("twice", c.mixture_experts),
    ),
    refuse(
        "layer_type qk_pos_emb_head_dim",
        "qk_pos_emb_head_dim {qk_pos_emb_head_dim} is odd; rotations act on pairs of channels",
        lambda c: c.layer_type == "mixture" and c.qk_pos_emb_head_dim % 2,
    ),
    refuse(
        "layer_type num_experts",
        "a state space layer has no feed-forward, so no experts in its place; set num_experts to null",
        lambda c: c.layer_type == "state_space" and c.num_experts is not None,
    ),
    refuse(
        "num_attention_heads num_query_groups",
        "{num_attention_heads} heads cannot be shared out evenly over {num_query_groups} groups",
        lambda c: c.num_attention_heads % c.num_query_groups,
    ),
    refuse(
        f"kv_channels local_position_embedding global_position_embedding num_layers {_SCHEDULE}",
        "kv_channels {kv_channels} is odd; rotations (grape_m, rope) act on pairs of channels",
        lambda c: c.kv_channels % 2 and c.rotates,
    ),
    refuse(
        _SCHEDULE,
        "a window of {window_size} and no local layer to have it; set window_size to null, or the frequency above 1",
        lambda c: c.window_size is not None and not c.has_local,
    ),
    refuse(
        "window_size seq_length",
        "a window of {window_size} never ends within {seq_length} tokens; lower it or set null",
        lambda c: (c.window_size or 0) > c.seq_length,
    ),
    refuse(
        f"tpa {_SCHEDULE}",
        "tensor product attention is for local layers and this schedule has none; set tpa to false",
        lambda c: c.tpa and not c.has_local,
    ),
    refuse(
        "value_residual num_layers",
        "the only layer has no later one to mix its values into; set value_residual to false",
        lambda c: c.value_residual and c.num_layers == 1,
    ),
    refuse(
        "first_dense_layers num_layers num_experts",
        "the first {first_dense_layers} of {num_layers} layers are dense, so no expert would ever be used",
        lambda c: c.num_experts is not None and c.first_dense_layers >= c.num_layers,
    ),
    refuse(
        "moe_router_topk num_experts",
        "cannot choose {moe_router_topk} of {num_experts} experts",
        lambda c: c.num_experts is not None and c.moe_router_topk > c.num_experts,
    ),
    refuse(
        "moe_router_topk moe_router_score_function num_experts",
        "softmax over a single chosen expert is always 1, and the router would learn nothing; use sigmoid",
        lambda c: c.num_experts is not None and c.moe_router_topk == 1 and c.moe_router_score_function == "softmax",
    ),
    refuse(
        "moe_router_enable_expert_bias moe_router_score_function num_experts",
        "the expert bias needs sigmoid scores; use sigmoid or switch the bias off",
        lambda c: c.num_experts and c.moe_router_enable_expert_bias and c.moe_router_score_function != "sigmoid",
    ),
    refuse(
        f"{_GROUPS} num_experts",
        "{moe_router_num_groups} and {moe_router_group_topk}: give both or set both to null",
        lambda c: c.num_experts and (c.moe_router_num_groups is None) != (c.moe_router_group_topk is None),
    ),
    refuse(
        f"num_experts {_GROUPS}",
        "{num_experts} experts cannot be divided into {moe_router_num_groups} equal groups",
        lambda c: c.grouped and c.num_experts % c.moe_router_num_groups,
    ),
    refuse(
        f"{_GROUPS} num_experts",
        "cannot choose {moe_router_group_topk} of {moe_router_num_groups} groups",
        lambda c: c.grouped and c.moe_router_group_topk > c.moe_router_num_groups,
    ),
    refuse(
        f"moe_router_topk {_GROUPS} num_experts",
        "a group is scored by its topk / group_topk best experts, and {moe_router_topk} / {moe_router_group_topk} is "
        "not a whole number",
        lambda c: c.grouped and c.moe_router_topk % c.moe_router_group_topk,
    ),
    refuse(
        f"moe_router_topk num_experts {_GROUPS}",
        "{moe_router_group_topk} of {moe_router_num_groups} groups of {num_experts} experts do not hold "
        "{moe_router_topk}",
        _groups_too_small,
    ),
    refuse(
        "hidden_size moe_ffn_hidden_size num_experts bf16",
        "the experts' grouped product wants rows of whole 16 bytes: sizes {hidden_size} and {moe_ffn_hidden_size} must "
        "be multiples of 8 in bf16 and of 4 in fp32",
        _unaligned,
    ),
    refuse(
        "experts_precision bf16 num_experts",
        "the products of {experts_precision} come back in bf16; set bf16 to true, or experts_precision to null",
        lambda c: c.num_experts is not None and c.experts_precision is not None and not c.bf16,
    ),
    refuse(
        "experts_precision compile num_experts",
        "the conversions to {experts_precision} are not compiled with the experts; take compile: layers, which leaves "
        "them as they are",
        lambda c: c.num_experts is not None and c.experts_precision is not None and c.compile == "step",
    ),
    refuse(
        "experts_precision hidden_size moe_ffn_hidden_size num_experts",
        "{experts_precision} wants whole blocks: sizes {hidden_size} and {moe_ffn_hidden_size} must be multiples of "
        "{block}",
        _outside_format,
    ),
)
"""Every combination of architecture that is refused."""

OF_ATTENTION = (
    *("ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "add_bias_linear", "add_qkv_bias"),
    *("qk_layernorm", "activation", "softmax_type", "window_size", "window_attn_skip_freq"),
    *("local_position_embedding", "global_position_embedding", "rotary_base", "grapem_log_freq_scale"),
    *("tpa", "tpa_rank", "tpa_q_rank", "tpa_factor_bias", "value_residual", "attention_backend"),
)
"""What only a layer with attention and a feed-forward reads."""

OF_EXPERTS = (
    *(name for name in section_types()["moe"].model_fields if name != "num_experts"),
    *(name for name in section_types()["logging"].model_fields if name.startswith(("router_", "moe_"))),
    "router_lr",
    "normuon_idle_expert_policy",
)
"""What only a model with experts reads."""

IDLE: tuple[Rule, ...] = (
    idle(" ".join(OF_ATTENTION), "`layer_type` is state_space", lambda c: c.layer_type == "state_space"),
    idle(
        "ssm_inner_size ssm_state_size ssm_conv_size ssm_step_rank",
        "`layer_type` is no state_space, nor a mixture with such an expert",
        lambda c: "state_space" not in c.layer_types,
    ),
    idle(
        "diffusion_levels ddim_steps",
        "`layer_type` is no denoiser, nor a mixture with such an expert",
        lambda c: "denoiser" not in c.layer_types,
    ),
    idle(
        "mixture_experts kv_lora_rank qk_pos_emb_head_dim memory_entries",
        "`layer_type` is no mixture",
        lambda c: c.layer_type != "mixture",
    ),
    idle("num_layers", "`layer_type` is mixture: its experts have their own", lambda c: c.layer_type == "mixture"),
    idle(" ".join(OF_EXPERTS), "`num_experts` is null: a dense model", lambda c: c.num_experts is None),
    idle("ffn_hidden_size", "every layer has experts", lambda c: all(c.sparse)),
    idle("window_attn_skip_freq", "`window_size` is null", lambda c: c.window_size is None),
    idle("local_position_embedding", "no layer is local", lambda c: not c.has_local),
    idle("global_position_embedding", "no layer is global", lambda c: not c.has_global),
    idle("tpa_rank tpa_q_rank tpa_factor_bias", "`tpa` is false", lambda c: not c.tpa),
    idle("rotary_base", "no layer has grape_m or rope", lambda c: not c.rotates),
    idle("grapem_log_freq_scale", "no layer has grape_m", lambda c: "grape_m" not in c.positions),
    idle(
        "moe_router_num_groups",
        "`moe_router_group_topk` equals `moe_router_topk`: a group counts by its best expert, and the best experts lie "
        "in the best groups anyhow",
        lambda c: c.grouped and c.moe_router_group_topk == c.moe_router_topk,
    ),
    idle(
        "moe_aux_loss_coeff",
        "`moe_router_load_balancing_type` is none",
        lambda c: c.num_experts is not None and c.moe_router_load_balancing_type == "none",
    ),
    idle(
        "moe_router_bias_update_rate",
        "`moe_router_enable_expert_bias` is false",
        lambda c: c.num_experts is not None and not c.moe_router_enable_expert_bias,
    ),
)
"""Every field of the architecture that changes nothing somewhere."""
