"""What the ``recompute_*`` fields demand of each other and of the model."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vpmoe.config.schema import RunConfig

Findings = Iterator[tuple[tuple[str, ...], str]]

_NEEDS_FREED_OUTPUT = "saves memory only if its output is freed and refilled in place, which is not done here"
_NOT_RECOMPUTED = {
    "layernorm": _NEEDS_FREED_OUTPUT,
    "moe_act": _NEEDS_FREED_OUTPUT,
    "mla_up_proj": "belongs to multi-latent attention, which this model does not have",
}


def recomputation_problems(cfg: RunConfig) -> Findings:
    """(fields, what is wrong) for every combination that would do nothing, or not what it says."""
    t = cfg.training
    wanted = {"recompute_method": "full", "recompute_num_layers": "full", "recompute_modules": "selective"}
    for name, granularity in wanted.items():
        if getattr(t, name) is not None and t.recompute_granularity != granularity:
            yield (
                (name, "recompute_granularity"),
                f"has no effect unless recompute_granularity is {granularity}; set it to null",
            )
    if t.recompute_num_layers is not None and t.recompute_num_layers > cfg.model.num_layers:
        yield (
            ("recompute_num_layers", "num_layers"),
            f"{t.recompute_num_layers} is more than the {cfg.model.num_layers} layers there are",
        )
    if t.recompute_modules is not None:
        yield from _modules(cfg, list(t.recompute_modules))


def _modules(cfg: RunConfig, modules: list[str]) -> Findings:
    name = "recompute_modules"
    if not modules or len(set(modules)) < len(modules):
        yield (name,), f"{modules} must name each part once, and at least one"
    for module in sorted(set(modules) & set(_NOT_RECOMPUTED)):
        yield (name,), f"{module} {_NOT_RECOMPUTED[module]}; use core_attn, mlp, moe or shared_experts"
    sparse = [cfg.is_moe_layer(n) for n in range(1, cfg.model.num_layers + 1)]
    if "mlp" in modules and all(sparse):
        yield (name, "first_layer_dense"), "mlp is the dense layers' and every layer has routed experts"
    for module in sorted({"moe", "shared_experts"} & set(modules)):
        if not any(sparse):
            yield (name, "num_experts"), f"{module} is the MoE layers' and there is none; use mlp"
    if "shared_experts" in modules and cfg.moe.moe_shared_expert_intermediate_size is None:
        yield (name, "moe_shared_expert_intermediate_size"), "there is no shared expert to recompute"
    if {"moe", "shared_experts"} <= set(modules):
        yield (name,), "moe recomputes the shared expert already; leave shared_experts out"
