"""Rules of how a run goes: attention backends, schedules and limits, what is trained, recomputation, datasets."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

from megatron_vpmoe.config.flags import nearest
from megatron_vpmoe.config.parameters import is_trained, parameter_sizes
from megatron_vpmoe.config.rule import Rule, View, refuse

Facts = list[Mapping[str, object]]


def _unmatched(c: View) -> Facts:
    if not c.train_only:
        return []
    names = list(parameter_sizes(c.cfg))
    kinds = list({re.sub(r"layers\.\d+", "layers.*", name): name for name in names})  # of any depth, a few dozen
    return [
        {"pattern": pattern, "near": ", ".join(nearest(pattern, kinds))}
        for pattern in c.train_only
        if not fnmatch.filter(names, pattern)
    ]


def _bare_bias(c: View) -> Facts:
    """A trained bias that its frozen matrix adds itself."""
    fused = [n for n in parameter_sizes(c.cfg) if n.endswith((".linear_qkv.bias", ".linear_tpa_a.bias"))]
    pairs = [(bias, bias.removesuffix("bias") + "weight") for bias in fused]
    bare = [pair for pair in pairs if is_trained(c.cfg, pair[0]) and not is_trained(c.cfg, pair[1])]
    return [{"bias": bias, "matrix": matrix} for bias, matrix in bare[:1]]


def _fails_below_warning(fail: str, warn: str, c: View) -> bool:
    return None not in (c[fail], c[warn]) and c[fail] < c[warn]


# Limit on the router's health -> its metric where every token of a layer chooses the same experts: it gets no worse.
_WORST: dict[str, Callable[[View], float]] = {
    "router_dead_experts_{}": lambda c: sum(c.sparse) * (c.num_experts - c.moe_router_topk),
    "router_max_load_{}_pct": lambda c: 100 / c.moe_router_topk,
    "router_cv_{}_pct": lambda c: 100 * (c.num_experts / c.moe_router_topk - 1) ** 0.5,
    "router_max_vio_{}": lambda c: c.num_experts / c.moe_router_topk - 1,
}


def _never_reached(name: str, worst: Callable[[View], float], c: View) -> Facts:
    if None in (c.num_experts, c[name]) or c.moe_router_topk > c.num_experts:
        return []
    # Dead experts count from the limit on; everything else has to exceed it.
    reached = c[name] <= worst(c) if "dead" in name else c[name] < worst(c)
    return [] if reached else [{"worst_case": round(worst(c), 1)}]


_TRAINING = (
    refuse(
        "deterministic teacher_server",
        "a served teacher says of the same text one time this and one time that, by what else it serves; use "
        "teacher_weights, or store ahead what it says (vpmoe data)",
        lambda c: c.deterministic and c.teacher_server is not None,
    ),
    refuse(
        "deterministic experts_precision",
        "nobody has shown that the kernels of `experts_precision` repeat bit for bit; leave one of the two out",
        lambda c: c.deterministic and c.experts_precision is not None,
    ),
    refuse(
        "attention_backend window_size window_attn_skip_freq",
        "banded serves layers with a window only and the schedule has global layers; use auto",
        lambda c: c.attention_backend == "banded" and c.has_global,
    ),
    refuse(
        "attention_backend local_position_embedding",
        "banded has no bias on distance (grape_a); use auto",
        lambda c: c.attention_backend == "banded" and not c.has_global and "grape_a" in c.positions,
    ),
    refuse("min_lr lr", "min_lr {min_lr:g} is above the peak {lr:g}; lower min_lr", lambda c: c.min_lr > c.lr),
    refuse(
        "weight_decay lr normuon_aux_lr decoupled_lr router_lr",
        "a step multiplies weights by 1 - {weight_decay:g} x {highest:g}, which is not above 0; lower weight_decay",
        lambda c: [
            {"highest": rate}
            for rate in [max(c.lr, c.cfg.aux_lr, c.cfg.embedding_lr, c.cfg.router_lr)]
            if rate * c.weight_decay >= 1
        ],
    ),
    refuse(
        "lr_warmup_iters lr_decay_iters train_iters",
        "a warm-up of {lr_warmup_iters} iterations leaves nothing of a schedule of {decay_iters}",
        lambda c: c.lr_warmup_iters >= c.decay_iters,
    ),
    refuse(
        "lr_wsd_decay_iters",
        "the WSD schedule needs the length of its final decay",
        lambda c: c.lr_decay_style == "WSD" and c.lr_wsd_decay_iters is None,
    ),
    refuse(
        "lr_wsd_decay_iters lr_decay_style",
        "has no effect on the schedule {lr_decay_style}",
        lambda c: c.lr_decay_style != "WSD" and c.lr_wsd_decay_iters is not None,
    ),
    refuse(
        "lr_wsd_decay_iters lr_warmup_iters lr_decay_iters",
        "warm-up {lr_warmup_iters} and final decay {lr_wsd_decay_iters} exceed {decay_iters} iterations",
        lambda c: c.lr_wsd_decay_iters is not None and c.lr_wsd_decay_iters + c.lr_warmup_iters > c.decay_iters,
    ),
    refuse(
        "nonfinite_policy nonfinite_max_skips",
        "the policy {nonfinite_policy} does not go with {nonfinite_max_skips} permitted skips",
        lambda c: (c.nonfinite_policy == "skip") != (c.nonfinite_max_skips > 0),
    ),
    refuse(
        "kd_span_weight_reasoning kd_span_weight_final",
        "both are 0, so nothing would be learnt",
        lambda c: c.kd_span_weight_reasoning == c.kd_span_weight_final == 0,
    ),
    refuse("train_only", "an empty list trains nothing; null trains everything", lambda c: c.train_only == []),
    refuse("train_only", "no parameter matches '{pattern}'; near: {near}", _unmatched),
    refuse(
        "train_only",
        "{bias} is trained and its matrix is not: Megatron-Core's linear gives the bias of a frozen matrix no "
        "gradient; add {matrix}, or leave the bias out",
        _bare_bias,
    ),
    refuse(
        "keep_every save_interval",
        "{keep_every} is not a multiple of {save_interval}, so nothing would be kept",
        lambda c: c.keep_every is not None and (c.save_interval is None or c.keep_every % c.save_interval),
    ),
    *(
        refuse(
            f"{name} num_experts moe_router_topk",
            f"{{{name}}} is never reached: it comes to {{worst_case}} where all tokens choose the same "
            "{moe_router_topk} of {num_experts} experts; lower it, or set null",
            partial(_never_reached, name, worst),
        )
        for limit, worst in _WORST.items()
        for name in (limit.format("warn"), limit.format("fail"))
    ),
    *(
        refuse(f"{fail} {warn}", f"fails at {{{fail}}}, warns at {{{warn}}}", partial(_fails_below_warning, fail, warn))
        for fail, warn in ((limit.format("fail"), limit.format("warn")) for limit in _WORST)
    ),
    refuse(
        "global_batch_size micro_batch_size",
        "{global_batch_size} rows are not a whole number of micro-batches of {micro_batch_size}",
        lambda c: not c.samples and c.global_batch_size % c.micro_batch_size,  # of answers any number is packed
    ),
)

_RECOMPUTATION = (
    refuse(
        "layer_type recompute_method recompute_num_layers",
        "a mixture runs each expert again as a whole; set both to null",
        lambda c: c.layer_type == "mixture" and (c.recompute_method, c.recompute_num_layers) != (None, None),
    ),
    refuse(
        "layer_type recompute_granularity",
        "selective recomputes parts of transformer layers; set it to full, or to null",
        lambda c: c.layer_type != "transformer" and c.recompute_granularity == "selective",
    ),
    *(
        refuse(
            f"{name} recompute_granularity",
            f"has no effect unless recompute_granularity is {granularity}; set it to null",
            lambda c, name=name, granularity=granularity: (
                c[name] is not None and c.recompute_granularity != granularity
            ),
        )
        for name, granularity in (
            ("recompute_method", "full"),
            ("recompute_num_layers", "full"),
            ("recompute_modules", "selective"),
        )
    ),
    refuse(
        "recompute_num_layers num_layers",
        "{recompute_num_layers} is more than the {num_layers} layers there are",
        lambda c: (c.recompute_num_layers or 0) > c.num_layers,
    ),
    refuse(
        "recompute_modules",
        "{recompute_modules} must name each part once, and at least one",
        lambda c: c.recompute_modules is not None and len(set(c.recompute_modules)) < max(1, len(c.recompute_modules)),
    ),
    refuse(
        "recompute_modules first_dense_layers",
        "mlp is the dense layers' and every layer has routed experts",
        lambda c: "mlp" in (c.recompute_modules or ()) and all(c.sparse),
    ),
    *(
        refuse(
            "recompute_modules num_experts",
            f"{module} is the MoE layers' and there is none; use mlp",
            lambda c, module=module: module in (c.recompute_modules or ()) and not any(c.sparse),
        )
        for module in ("moe", "shared_experts")
    ),
    refuse(
        "recompute_modules moe_shared_expert_intermediate_size",
        "there is no shared expert to recompute",
        lambda c: "shared_experts" in (c.recompute_modules or ()) and c.moe_shared_expert_intermediate_size is None,
    ),
    refuse(
        "recompute_modules",
        "moe recomputes the shared expert already; leave shared_experts out",
        lambda c: {"moe", "shared_experts"} <= set(c.recompute_modules or ()),
    ),
)


def _weights(c: View) -> list[tuple[str, list[float]]]:
    """(where, weights) of a blend and of each change of them."""
    if not c.blend:
        return []
    changes = [(f"from sample {change.from_sample}: ", change.weights) for change in c.blend_schedule or ()]
    return [("", [part.weight for part in c.blend]), *changes]


def _twice(values: list[str]) -> list[str]:
    return sorted({value for value in values if values.count(value) > 1})


def _paths(c: View) -> list[str]:
    return [os.path.normpath(part.path) for part in c.blend or ()]


def _same_names(c: View) -> Facts:
    names = [] if _twice(_paths(c)) else [part.label for part in c.blend or ()]
    return [{"dataset": name} for name in _twice(names)]


def _never_read(c: View) -> Facts:
    lists = [weights for _, weights in _weights(c)]
    return [
        {"dataset": part.path}
        for number, part in enumerate(c.blend or ())
        if not any(number < len(weights) and weights[number] for weights in lists)
    ]


def _falling(c: View) -> Facts:
    starts = [change.from_sample for change in c.blend_schedule or () if c.blend]
    return [{"after": after, "before": before} for before, after in pairwise(starts) if after <= before]


_DATA = (
    refuse(
        "data_path blend",
        "neither is given; data_path names one dataset, blend several",
        lambda c: c.blend is None and c.data_path is None,
    ),
    refuse(
        "data_path blend",
        "both are given; with a blend set data_path to null",
        lambda c: c.blend is not None and c.data_path is not None,
    ),
    refuse(
        "blend_schedule blend",
        "a schedule of weights needs a blend",
        lambda c: c.blend is None and c.blend_schedule is not None,
    ),
    refuse("blend", "names no dataset; give a list of {{path, weight}}", lambda c: c.blend == []),
    refuse(
        "blend",
        "the dataset {dataset} is listed twice; list it once with the sum of its weights",
        lambda c: [{"dataset": path} for path in _twice(_paths(c))],
    ),
    refuse("blend", "two datasets are called {dataset}; tell them apart with name:", _same_names),
    refuse(
        "blend_schedule blend",
        "{maybe_where}{weights} weights for {datasets} datasets",
        lambda c: [
            {"maybe_where": where, "weights": len(weights), "datasets": len(c.blend)}
            for where, weights in _weights(c)
            if len(weights) != len(c.blend)
        ],
    ),
    refuse(
        "blend blend_schedule",
        "{maybe_where}every weight is 0, so nothing would be read",
        lambda c: [{"maybe_where": where} for where, weights in _weights(c) if weights and not any(weights)],
    ),
    refuse("blend", "the weight of {dataset} is never above 0; leave the dataset out", _never_read),
    refuse(
        "skip_rows blend",
        "it has one number for each dataset",
        lambda c: c.skip_rows is not None and len(c.skip_rows) != len(c.blend or (c.data_path,)),
    ),
    refuse("blend_schedule", "from_sample {after} follows {before}; list them rising", _falling),
)

REFUSED: tuple[Rule, ...] = (*_TRAINING, *_RECOMPUTATION, *_DATA)
"""Every rule of a run but those of its processes."""
