"""Which choices of architecture go together: what is refused and why, and which fields are idle where.

Two tables, each stated here alone. A feature that is switched on and could never act is refused; a size or kind that
belongs to a feature which is off is idle, and `vpmoe model describe` lists it. docs/architecture.md carries both
tables; a test holds them to this file, and another walks the grid of all choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_vpmoe.config.schema import RunConfig, fields, section_types


@dataclass(frozen=True)
class Refusal:
    """A combination that no model is built for."""

    names: tuple[str, ...]
    """The fields that decide: setting these alone can mend it."""
    why: str
    """The reason and the remedy; ``{field}`` stands for a field's value."""
    applies: Callable[[RunConfig], bool]

    def text(self, cfg: RunConfig) -> str:
        """``why`` with the values of ``cfg``."""
        return self.why.format_map(_values(cfg))

    def general_text(self) -> str:
        """``why`` with the fields' names in place of values."""
        return self.why.format_map({name: f"`{name}`" for name in fields()})


@dataclass(frozen=True)
class Idle:
    """Fields that change nothing in some combination."""

    names: tuple[str, ...]
    where: str
    applies: Callable[[RunConfig], bool]


def _values(cfg: RunConfig) -> dict[str, Any]:
    return {name: getattr(getattr(cfg, spec.section), name) for name, spec in fields().items()}


def _layers(cfg: RunConfig) -> range:
    return range(1, cfg.model.num_layers + 1)


def _has_local(cfg: RunConfig) -> bool:
    return any(not cfg.is_global_layer(n) for n in _layers(cfg))


def _has_global(cfg: RunConfig) -> bool:
    return any(cfg.is_global_layer(n) for n in _layers(cfg))


def _positions(cfg: RunConfig) -> set[str]:
    return {cfg.position_embedding(n) for n in _layers(cfg)}


def _rotates(cfg: RunConfig) -> bool:
    return bool(_positions(cfg) & {"grape_m", "rope"})


def _groups_of_experts(cfg: RunConfig) -> tuple[int, int, int] | None:
    """(experts, groups, groups a token may use) where routing is limited to groups."""
    moe = cfg.moe
    if moe.num_experts is None or moe.moe_router_num_groups is None or moe.moe_router_group_topk is None:
        return None
    return moe.num_experts, moe.moe_router_num_groups, moe.moe_router_group_topk


def _groups_unequal(cfg: RunConfig) -> bool:
    found = _groups_of_experts(cfg)
    return found is not None and found[0] % found[1] != 0


def _too_many_groups(cfg: RunConfig) -> bool:
    found = _groups_of_experts(cfg)
    return found is not None and found[2] > found[1]


def _uneven_topk(cfg: RunConfig) -> bool:
    found = _groups_of_experts(cfg)
    return found is not None and cfg.moe.moe_router_topk % found[2] != 0


def _groups_too_small(cfg: RunConfig) -> bool:
    found = _groups_of_experts(cfg)
    if found is None or _too_many_groups(cfg) or _uneven_topk(cfg):
        return False
    experts, groups, group_topk = found
    return cfg.moe.moe_router_topk > group_topk * (experts // groups)


def _unaligned(cfg: RunConfig) -> bool:
    width = 8 if cfg.training.bf16 else 4
    return cfg.moe.num_experts is not None and any(
        size % width for size in (cfg.model.hidden_size, cfg.moe.moe_ffn_hidden_size)
    )


def _sparse(cfg: RunConfig) -> bool:
    return cfg.moe.num_experts is not None


_SCHEDULE = ("window_size", "window_attn_skip_freq")
_GROUPS = ("moe_router_num_groups", "moe_router_group_topk")

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        ("num_attention_heads", "num_query_groups"),
        "{num_attention_heads} heads cannot be shared out evenly over {num_query_groups} groups",
        lambda c: c.model.num_attention_heads % c.model.num_query_groups != 0,
    ),
    Refusal(
        ("kv_channels", "local_position_embedding", "global_position_embedding", "num_layers", *_SCHEDULE),
        "kv_channels {kv_channels} is odd; rotations (grape_m, rope) act on pairs of channels",
        lambda c: c.model.kv_channels % 2 != 0 and _rotates(c),
    ),
    Refusal(
        _SCHEDULE,
        "a window of {window_size} and no local layer to have it; set window_size to null, or the frequency above 1",
        lambda c: c.model.window_size is not None and not _has_local(c),
    ),
    Refusal(
        ("window_size", "seq_length"),
        "a window of {window_size} never ends within {seq_length} tokens; lower it or set null",
        lambda c: c.model.window_size is not None and c.model.window_size > c.data.seq_length,
    ),
    Refusal(
        ("tpa", *_SCHEDULE),
        "tensor product attention is for local layers and this schedule has none; set tpa to false",
        lambda c: c.model.tpa and not _has_local(c),
    ),
    Refusal(
        ("value_residual", "num_layers"),
        "the only layer has no later one to mix its values into; set value_residual to false",
        lambda c: c.model.value_residual and c.model.num_layers == 1,
    ),
    Refusal(
        ("activation", "num_experts"),
        "routed experts have no gate; use squared_relu",
        lambda c: c.model.activation == "swiglu" and _sparse(c),
    ),
    Refusal(
        ("first_layer_dense", "num_layers", "num_experts"),
        "the only layer is dense, so no expert would ever be used",
        lambda c: _sparse(c) and c.moe.first_layer_dense and c.model.num_layers == 1,
    ),
    Refusal(
        ("moe_router_topk", "num_experts"),
        "cannot choose {moe_router_topk} of {num_experts} experts",
        lambda c: c.moe.num_experts is not None and c.moe.moe_router_topk > c.moe.num_experts,
    ),
    Refusal(
        ("moe_router_topk", "moe_router_score_function", "num_experts"),
        "softmax over a single chosen expert is always 1, and the router would learn nothing; use sigmoid",
        lambda c: _sparse(c) and c.moe.moe_router_topk == 1 and c.moe.moe_router_score_function == "softmax",
    ),
    Refusal(
        ("moe_router_enable_expert_bias", "moe_router_score_function", "num_experts"),
        "the expert bias needs sigmoid scores; use sigmoid or switch the bias off",
        lambda c: _sparse(c) and c.moe.moe_router_enable_expert_bias and c.moe.moe_router_score_function != "sigmoid",
    ),
    Refusal(
        (*_GROUPS, "num_experts"),
        "{moe_router_num_groups} and {moe_router_group_topk}: give both or set both to null",
        lambda c: _sparse(c) and (c.moe.moe_router_num_groups is None) != (c.moe.moe_router_group_topk is None),
    ),
    Refusal(
        ("num_experts", *_GROUPS),
        "{num_experts} experts cannot be divided into {moe_router_num_groups} equal groups",
        _groups_unequal,
    ),
    Refusal(
        (*_GROUPS, "num_experts"),
        "cannot choose {moe_router_group_topk} of {moe_router_num_groups} groups",
        _too_many_groups,
    ),
    Refusal(
        ("moe_router_topk", *_GROUPS, "num_experts"),
        "a group is scored by its topk / group_topk best experts, and {moe_router_topk} / {moe_router_group_topk} is "
        "not a whole number",
        _uneven_topk,
    ),
    Refusal(
        ("moe_router_topk", "num_experts", *_GROUPS),
        "{moe_router_group_topk} of {moe_router_num_groups} groups of {num_experts} experts do not hold "
        "{moe_router_topk}",
        _groups_too_small,
    ),
    Refusal(
        ("hidden_size", "moe_ffn_hidden_size", "num_experts", "bf16"),
        "the experts' grouped product wants rows of whole 16 bytes: sizes {hidden_size} and {moe_ffn_hidden_size} must "
        "be multiples of 8 in bf16 and of 4 in fp32",
        _unaligned,
    ),
)
"""Every combination of architecture that is refused."""

_OF_EXPERTS = (
    *(name for name in section_types()["moe"].model_fields if name != "num_experts"),
    *(name for name in section_types()["logging"].model_fields if name.startswith(("router_", "moe_"))),
    "router_lr",
    "normuon_idle_expert_policy",
)

IDLE: tuple[Idle, ...] = (
    Idle(_OF_EXPERTS, "`num_experts` is null: a dense model", lambda c: not _sparse(c)),
    Idle(("ffn_hidden_size",), "every layer has experts", lambda c: all(c.is_moe_layer(n) for n in _layers(c))),
    Idle(("window_attn_skip_freq",), "`window_size` is null", lambda c: c.model.window_size is None),
    Idle(("local_position_embedding",), "no layer is local", lambda c: not _has_local(c)),
    Idle(("global_position_embedding",), "no layer is global", lambda c: not _has_global(c)),
    Idle(("tpa_rank", "tpa_q_rank", "tpa_factor_bias"), "`tpa` is false", lambda c: not c.model.tpa),
    Idle(("rotary_base",), "no layer has grape_m or rope", lambda c: not _rotates(c)),
    Idle(("grapem_log_freq_scale",), "no layer has grape_m", lambda c: "grape_m" not in _positions(c)),
    Idle(
        ("moe_router_num_groups",),
        "`moe_router_group_topk` equals `moe_router_topk`: a group counts by its best expert, and the best experts lie "
        "in the best groups anyhow",
        lambda c: _groups_of_experts(c) is not None and c.moe.moe_router_group_topk == c.moe.moe_router_topk,
    ),
    Idle(
        ("moe_aux_loss_coeff",),
        "`moe_router_load_balancing_type` is none",
        lambda c: _sparse(c) and c.moe.moe_router_load_balancing_type == "none",
    ),
    Idle(
        ("moe_router_bias_update_rate",),
        "`moe_router_enable_expert_bias` is false",
        lambda c: _sparse(c) and not c.moe.moe_router_enable_expert_bias,
    ),
)
"""Every field of the architecture that changes nothing somewhere."""


def idle_fields(cfg: RunConfig) -> dict[str, str]:
    """Field -> why it changes nothing in ``cfg``."""
    return {name: rule.where for rule in IDLE if rule.applies(cfg) for name in rule.names}


def idle_lines(cfg: RunConfig) -> list[str]:
    """One line for each reason: the fields that change nothing in ``cfg``, and why."""
    return [f"{_named(rule)}: {rule.where}".replace("`", "") for rule in IDLE if rule.applies(cfg)]


def _named(rule: Idle) -> str:
    if rule.names is _OF_EXPERTS:
        return "all of `moe`, and the thresholds and optimizer settings of experts"
    return ", ".join(f"`{name}`" for name in rule.names)


def refusal_table() -> str:
    """``REFUSALS`` as a Markdown table."""
    rows = [f"| {', '.join(f'`{name}`' for name in r.names)} | {r.general_text()} |" for r in REFUSALS]
    return "\n".join(["| fields | refused because |", "|---|---|", *rows])


def idle_table() -> str:
    """``IDLE`` as a Markdown table."""
    rows = [f"| {_named(rule)} | {rule.where} |" for rule in IDLE]
    return "\n".join(["| idle | where |", "|---|---|", *rows])
