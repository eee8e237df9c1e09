"""Rules of the architecture: which choices no model is built for, and which fields are idle beside others.

A feature that is switched on and could never act is refused; a size or kind that belongs to a feature which is off is
idle, and `vpmoe model describe` lists it. A test walks the grid of all choices.
"""

from __future__ import annotations

from functools import partial

from megatron_vpmoe.config.rule import Rule
from megatron_vpmoe.config.schema import RunConfig, section_types


def layers(cfg: RunConfig) -> range:
    """The layers' numbers."""
    return range(1, cfg.model.num_layers + 1)


def has_global(cfg: RunConfig) -> bool:
    """Whether any layer has no window."""
    return any(cfg.is_global_layer(n) for n in layers(cfg))


def positions(cfg: RunConfig) -> set[str]:
    """The kinds of positions that layers have."""
    return {cfg.position_embedding(n) for n in layers(cfg)}


def _has_local(cfg: RunConfig) -> bool:
    return any(not cfg.is_global_layer(n) for n in layers(cfg))


def _rotates(cfg: RunConfig) -> bool:
    return bool(positions(cfg) & {"grape_m", "rope"})


def _sparse(cfg: RunConfig) -> bool:
    return cfg.moe.num_experts is not None


def _grouped(cfg: RunConfig) -> bool:
    """Whether routing is limited to groups."""
    return _sparse(cfg) and None not in (cfg.moe.moe_router_num_groups, cfg.moe.moe_router_group_topk)


def _groups(cfg: RunConfig) -> tuple[int, int, int]:
    """(experts, groups, groups that a token may use) where routing is limited to groups."""
    moe = cfg.moe
    return moe.num_experts or 0, moe.moe_router_num_groups or 1, moe.moe_router_group_topk or 1


def _too_many_groups(cfg: RunConfig) -> bool:
    _, groups, group_topk = _groups(cfg)
    return _grouped(cfg) and group_topk > groups


def _uneven_topk(cfg: RunConfig) -> bool:
    return _grouped(cfg) and cfg.moe.moe_router_topk % _groups(cfg)[2] != 0


def _groups_too_small(cfg: RunConfig) -> bool:
    if not _grouped(cfg) or _too_many_groups(cfg) or _uneven_topk(cfg):
        return False
    experts, groups, group_topk = _groups(cfg)
    return cfg.moe.moe_router_topk > group_topk * (experts // groups)


def _unaligned(cfg: RunConfig) -> bool:
    width = 8 if cfg.training.bf16 else 4
    return _sparse(cfg) and any(size % width for size in (cfg.model.hidden_size, cfg.moe.moe_ffn_hidden_size))


_SCHEDULE = ("window_size", "window_attn_skip_freq")
_GROUPS = ("moe_router_num_groups", "moe_router_group_topk")

REFUSED: tuple[Rule, ...] = (
    Rule(
        ("num_attention_heads", "num_query_groups"),
        "{num_attention_heads} heads cannot be shared out evenly over {num_query_groups} groups",
        lambda c: c.model.num_attention_heads % c.model.num_query_groups != 0,
    ),
    Rule(
        ("kv_channels", "local_position_embedding", "global_position_embedding", "num_layers", *_SCHEDULE),
        "kv_channels {kv_channels} is odd; rotations (grape_m, rope) act on pairs of channels",
        lambda c: c.model.kv_channels % 2 != 0 and _rotates(c),
    ),
    Rule(
        _SCHEDULE,
        "a window of {window_size} and no local layer to have it; set window_size to null, or the frequency above 1",
        lambda c: c.model.window_size is not None and not _has_local(c),
    ),
    Rule(
        ("window_size", "seq_length"),
        "a window of {window_size} never ends within {seq_length} tokens; lower it or set null",
        lambda c: c.model.window_size is not None and c.model.window_size > c.data.seq_length,
    ),
    Rule(
        ("tpa", *_SCHEDULE),
        "tensor product attention is for local layers and this schedule has none; set tpa to false",
        lambda c: c.model.tpa and not _has_local(c),
    ),
    Rule(
        ("value_residual", "num_layers"),
        "the only layer has no later one to mix its values into; set value_residual to false",
        lambda c: c.model.value_residual and c.model.num_layers == 1,
    ),
    Rule(
        ("activation", "num_experts"),
        "routed experts have no gate; use squared_relu",
        lambda c: c.model.activation == "swiglu" and _sparse(c),
    ),
    Rule(
        ("first_layer_dense", "num_layers", "num_experts"),
        "the only layer is dense, so no expert would ever be used",
        lambda c: _sparse(c) and c.moe.first_layer_dense and c.model.num_layers == 1,
    ),
    Rule(
        ("moe_router_topk", "num_experts"),
        "cannot choose {moe_router_topk} of {num_experts} experts",
        lambda c: c.moe.num_experts is not None and c.moe.moe_router_topk > c.moe.num_experts,
    ),
    Rule(
        ("moe_router_topk", "moe_router_score_function", "num_experts"),
        "softmax over a single chosen expert is always 1, and the router would learn nothing; use sigmoid",
        lambda c: _sparse(c) and c.moe.moe_router_topk == 1 and c.moe.moe_router_score_function == "softmax",
    ),
    Rule(
        ("moe_router_enable_expert_bias", "moe_router_score_function", "num_experts"),
        "the expert bias needs sigmoid scores; use sigmoid or switch the bias off",
        lambda c: _sparse(c) and c.moe.moe_router_enable_expert_bias and c.moe.moe_router_score_function != "sigmoid",
    ),
    Rule(
        (*_GROUPS, "num_experts"),
        "{moe_router_num_groups} and {moe_router_group_topk}: give both or set both to null",
        lambda c: _sparse(c) and (c.moe.moe_router_num_groups is None) != (c.moe.moe_router_group_topk is None),
    ),
    Rule(
        ("num_experts", *_GROUPS),
        "{num_experts} experts cannot be divided into {moe_router_num_groups} equal groups",
        lambda c: _grouped(c) and _groups(c)[0] % _groups(c)[1] != 0,
    ),
    Rule(
        (*_GROUPS, "num_experts"),
        "cannot choose {moe_router_group_topk} of {moe_router_num_groups} groups",
        _too_many_groups,
    ),
    Rule(
        ("moe_router_topk", *_GROUPS, "num_experts"),
        "a group is scored by its topk / group_topk best experts, and {moe_router_topk} / {moe_router_group_topk} is "
        "not a whole number",
        _uneven_topk,
    ),
    Rule(
        ("moe_router_topk", "num_experts", *_GROUPS),
        "{moe_router_group_topk} of {moe_router_num_groups} groups of {num_experts} experts do not hold "
        "{moe_router_topk}",
        _groups_too_small,
    ),
    Rule(
        ("hidden_size", "moe_ffn_hidden_size", "num_experts", "bf16"),
        "the experts' grouped product wants rows of whole 16 bytes: sizes {hidden_size} and {moe_ffn_hidden_size} must "
        "be multiples of 8 in bf16 and of 4 in fp32",
        _unaligned,
    ),
)
"""Every combination of architecture that is refused."""

_Idle = partial(Rule, kind="idle")

OF_EXPERTS = (
    *(name for name in section_types()["moe"].model_fields if name != "num_experts"),
    *(name for name in section_types()["logging"].model_fields if name.startswith(("router_", "moe_"))),
    "router_lr",
    "normuon_idle_expert_policy",
)
"""What only a model with experts reads."""

IDLE: tuple[Rule, ...] = (
    _Idle(OF_EXPERTS, "`num_experts` is null: a dense model", lambda c: not _sparse(c)),
    _Idle(("ffn_hidden_size",), "every layer has experts", lambda c: all(c.is_moe_layer(n) for n in layers(c))),
    _Idle(("window_attn_skip_freq",), "`window_size` is null", lambda c: c.model.window_size is None),
    _Idle(("local_position_embedding",), "no layer is local", lambda c: not _has_local(c)),
    _Idle(("global_position_embedding",), "no layer is global", lambda c: not has_global(c)),
    _Idle(("tpa_rank", "tpa_q_rank", "tpa_factor_bias"), "`tpa` is false", lambda c: not c.model.tpa),
    _Idle(("rotary_base",), "no layer has grape_m or rope", lambda c: not _rotates(c)),
    _Idle(("grapem_log_freq_scale",), "no layer has grape_m", lambda c: "grape_m" not in positions(c)),
    _Idle(
        ("moe_router_num_groups",),
        "`moe_router_group_topk` equals `moe_router_topk`: a group counts by its best expert, and the best experts lie "
        "in the best groups anyhow",
        lambda c: _grouped(c) and c.moe.moe_router_group_topk == c.moe.moe_router_topk,
    ),
    _Idle(
        ("moe_aux_loss_coeff",),
        "`moe_router_load_balancing_type` is none",
        lambda c: _sparse(c) and c.moe.moe_router_load_balancing_type == "none",
    ),
    _Idle(
        ("moe_router_bias_update_rate",),
        "`moe_router_enable_expert_bias` is false",
        lambda c: _sparse(c) and not c.moe.moe_router_enable_expert_bias,
    ),
)
"""Every field of the architecture that changes nothing somewhere."""
