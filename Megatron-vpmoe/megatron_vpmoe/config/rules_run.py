"""Rules of how a run goes: attention backends, schedules and limits, what is trained, recomputation."""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
from collections.abc import Callable
from functools import partial

from megatron_vpmoe.config.parameters import is_trained, parameter_sizes
from megatron_vpmoe.config.rule import Facts, Rule, getter
from megatron_vpmoe.config.rules_model import has_global, layers, positions
from megatron_vpmoe.config.schema import RunConfig


def _sparse(cfg: RunConfig) -> list[bool]:
    """Of each layer whether it has experts."""
    return [cfg.is_moe_layer(n) for n in layers(cfg)]


def _given(name: str, cfg: RunConfig) -> bool:
    return getter(cfg, name) is not None


# Attention backends and kernels.


def _needs_transformer_engine(name: str, cfg: RunConfig) -> bool:
    asked = cfg.moe.num_experts is not None and getter(cfg, name)
    return asked and importlib.util.find_spec("transformer_engine") is None


_KERNELS = (
    Rule(
        ("attention_backend", "window_size", "window_attn_skip_freq"),
        "banded serves layers with a window only and the schedule has global layers; use auto",
        lambda c: c.model.attention_backend == "banded" and has_global(c),
    ),
    Rule(
        ("attention_backend", "local_position_embedding"),
        "banded has no bias on distance (grape_a); use auto",
        lambda c: c.model.attention_backend == "banded" and not has_global(c) and "grape_a" in positions(c),
    ),
    *(
        Rule(
            (name,),
            "is a TransformerEngine kernel and TransformerEngine is not installed; set false",
            partial(_needs_transformer_engine, name),
        )
        for name in ("moe_permute_fusion", "moe_router_fusion")
    ),
)

# Schedules, limits and what is trained.


def _unreachable(name: str, cfg: RunConfig) -> list[Facts]:
    limit, experts = getter(cfg, name), (cfg.moe.num_experts or 0) * sum(_sparse(cfg))
    never = cfg.moe.num_experts is not None and limit is not None and limit > experts
    return [{"routed_experts": experts}] if never else []


def _fails_below_warning(fail: str, warn: str, cfg: RunConfig) -> bool:
    return _given(fail, cfg) and _given(warn, cfg) and getter(cfg, fail) < getter(cfg, warn)


def _iters(broken: Callable[[RunConfig], bool], cfg: RunConfig) -> list[Facts]:
    return [{"decay_iters": cfg.decay_iters}] if broken(cfg) else []


def _keeps_nothing(cfg: RunConfig) -> bool:
    save, keep = cfg.checkpoint.save_interval, cfg.checkpoint.keep_every
    return keep is not None and (save is None or keep % save != 0)


def _unmatched(cfg: RunConfig) -> list[Facts]:
    names = list(parameter_sizes(cfg))
    return [
        {"pattern": pattern, "near": ", ".join(difflib.get_close_matches(pattern, names, 3, 0.0))}
        for pattern in cfg.training.train_only or ()
        if not fnmatch.filter(names, pattern)
    ]


def _bare_bias(cfg: RunConfig) -> list[Facts]:
    """A trained bias that its frozen matrix adds itself."""
    fused = [n for n in parameter_sizes(cfg) if n.endswith((".linear_qkv.bias", ".linear_tpa_a.bias"))]
    pairs = [(bias, bias.removesuffix("bias") + "weight") for bias in fused]
    bare = [pair for pair in pairs if is_trained(cfg, pair[0]) and not is_trained(cfg, pair[1])]
    return [{"bias": bias, "matrix": matrix} for bias, matrix in bare[:1]]


_LIMITS = ("dead_experts_{}", "max_load_{}_pct", "cv_{}_pct", "max_vio_{}")
_WSD = ("lr_wsd_decay_iters", "lr_decay_style")

_TRAINING = (
    Rule(
        ("min_lr", "lr"),
        "min_lr {min_lr:g} is above the peak {lr:g}; lower min_lr",
        lambda c: c.optim.min_lr > c.optim.lr,
    ),
    Rule(
        ("lr_warmup_iters", "lr_decay_iters", "train_iters"),
        "a warm-up of {lr_warmup_iters} iterations leaves nothing of a schedule of {decay_iters}",
        partial(_iters, lambda c: c.optim.lr_warmup_iters >= c.decay_iters),
    ),
    Rule(
        _WSD[:1],
        "the WSD schedule needs the length of its final decay",
        lambda c: c.optim.lr_decay_style == "WSD" and c.optim.lr_wsd_decay_iters is None,
    ),
    Rule(
        _WSD,
        "has no effect on the schedule {lr_decay_style}",
        lambda c: c.optim.lr_decay_style != "WSD" and c.optim.lr_wsd_decay_iters is not None,
    ),
    Rule(
        ("lr_wsd_decay_iters", "lr_warmup_iters", "lr_decay_iters"),
        "warm-up {lr_warmup_iters} and final decay {lr_wsd_decay_iters} exceed {decay_iters} iterations",
        partial(
            _iters,
            lambda c: (
                c.optim.lr_wsd_decay_iters is not None
                and c.optim.lr_wsd_decay_iters + c.optim.lr_warmup_iters > c.decay_iters
            ),
        ),
    ),
    Rule(
        ("nonfinite_policy", "nonfinite_max_skips"),
        "the policy {nonfinite_policy} does not go with {nonfinite_max_skips} permitted skips",
        lambda c: (c.training.nonfinite_policy == "skip") != (c.training.nonfinite_max_skips > 0),
    ),
    Rule(
        ("kd_span_weight_reasoning", "kd_span_weight_final"),
        "both are 0, so nothing would be learnt",
        lambda c: c.training.kd_span_weight_reasoning == 0 and c.training.kd_span_weight_final == 0,
    ),
    Rule(
        ("train_only",), "an empty list trains nothing; null trains everything", lambda c: c.training.train_only == []
    ),
    Rule(("train_only",), "no parameter matches '{pattern}'; near: {near}", _unmatched),
    Rule(
        ("train_only",),
        "{bias} is trained and its matrix is not: Megatron-Core's linear gives the bias of a frozen matrix no "
        "gradient; add {matrix}, or leave the bias out",
        _bare_bias,
    ),
    Rule(
        ("keep_every", "save_interval"),
        "{keep_every} is not a multiple of {save_interval}, so nothing would be kept",
        _keeps_nothing,
    ),
    *(
        Rule(
            (name, "num_experts"),
            f"{{{name}}} is never reached: the model has {{routed_experts}} routed experts",
            partial(_unreachable, name),
        )
        for name in ("router_dead_experts_warn", "router_dead_experts_fail")
    ),
    *(
        Rule((fail, warn), f"fails at {{{fail}}}, warns at {{{warn}}}", partial(_fails_below_warning, fail, warn))
        for fail, warn in ((f"router_{limit.format('fail')}", f"router_{limit.format('warn')}") for limit in _LIMITS)
    ),
    Rule(
        ("global_batch_size", "micro_batch_size"),
        "{global_batch_size} rows are not a whole number of micro-batches of {micro_batch_size}",
        lambda c: c.training.global_batch_size % c.training.micro_batch_size != 0,
    ),
)

# What runs again backward instead of being kept.

_OF_GRANULARITY = {"recompute_method": "full", "recompute_num_layers": "full", "recompute_modules": "selective"}


def _of_another(name: str, cfg: RunConfig) -> bool:
    return _given(name, cfg) and cfg.training.recompute_granularity != _OF_GRANULARITY[name]


def _again(cfg: RunConfig) -> list[str]:
    return list(cfg.training.recompute_modules or ())


def _without_layers(module: str, cfg: RunConfig) -> bool:
    return module in _again(cfg) and not any(_sparse(cfg))


_RECOMPUTATION = (
    *(
        Rule(
            (name, "recompute_granularity"),
            f"has no effect unless recompute_granularity is {granularity}; set it to null",
            partial(_of_another, name),
        )
        for name, granularity in _OF_GRANULARITY.items()
    ),
    Rule(
        ("recompute_num_layers", "num_layers"),
        "{recompute_num_layers} is more than the {num_layers} layers there are",
        lambda c: (c.training.recompute_num_layers or 0) > c.model.num_layers,
    ),
    Rule(
        ("recompute_modules",),
        "{recompute_modules} must name each part once, and at least one",
        lambda c: c.training.recompute_modules is not None and len(set(_again(c))) < max(1, len(_again(c))),
    ),
    Rule(
        ("recompute_modules", "first_layer_dense"),
        "mlp is the dense layers' and every layer has routed experts",
        lambda c: "mlp" in _again(c) and all(_sparse(c)),
    ),
    *(
        Rule(
            ("recompute_modules", "num_experts"),
            f"{module} is the MoE layers' and there is none; use mlp",
            partial(_without_layers, module),
        )
        for module in ("moe", "shared_experts")
    ),
    Rule(
        ("recompute_modules", "moe_shared_expert_intermediate_size"),
        "there is no shared expert to recompute",
        lambda c: "shared_experts" in _again(c) and c.moe.moe_shared_expert_intermediate_size is None,
    ),
    Rule(
        ("recompute_modules",),
        "moe recomputes the shared expert already; leave shared_experts out",
        lambda c: {"moe", "shared_experts"} <= set(_again(c)),
    ),
)

REFUSED = (*_KERNELS, *_TRAINING, *_RECOMPUTATION)
"""Every rule of a run but those of its processes and datasets."""
