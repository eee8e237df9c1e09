"""Rules between fields: what the type of a single field cannot say, checked together before anything is allocated.

Those of the architecture are a table of their own, ``combinations``.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_vpmoe.config.blend import blend_problems
from megatron_vpmoe.config.combinations import REFUSALS
from megatron_vpmoe.config.parameters import is_trained, parameter_sizes
from megatron_vpmoe.config.pipeline import pipeline_problems
from megatron_vpmoe.config.recomputation import recomputation_problems
from megatron_vpmoe.config.schema import RunConfig


class Problem(NamedTuple):
    """A broken rule: the fields that take part, and what is wrong with the remedy in one sentence."""

    names: tuple[str, ...]
    text: str


Findings = Iterator[Problem]


def _architecture(cfg: RunConfig) -> Findings:
    yield from (Problem(refusal.names, refusal.text(cfg)) for refusal in REFUSALS if refusal.applies(cfg))


def _backend(cfg: RunConfig) -> Findings:
    if cfg.model.attention_backend == "transformer_engine":
        yield Problem(
            ("attention_backend",),
            "there is no adapter for the package transformer-engine, installed or not; use flex or auto on a GPU",
        )
    if cfg.model.attention_backend != "banded":
        return
    layers = range(1, cfg.model.num_layers + 1)
    if any(cfg.is_global_layer(n) for n in layers):
        yield Problem(
            ("attention_backend", "window_size", "window_attn_skip_freq"),
            "banded serves layers with a window only and the schedule has global layers; use auto",
        )
    elif any(cfg.position_embedding(n) == "grape_a" for n in layers):
        yield Problem(
            ("attention_backend", "local_position_embedding"), "banded has no bias on distance (grape_a); use auto"
        )


def _experts(cfg: RunConfig) -> Findings:
    moe = cfg.moe
    experts = moe.num_experts
    if experts is None:
        return
    if moe.moe_shared_expert_overlap:
        yield Problem(
            ("moe_shared_expert_overlap",),
            "upstream overlaps by CUDA streams inside its own shared expert, which has no biases and is not used "
            "here; set false",
        )
    for name in ("moe_permute_fusion", "moe_router_fusion"):
        if getattr(moe, name) and importlib.util.find_spec("transformer_engine") is None:
            yield Problem((name,), "is a TransformerEngine kernel and TransformerEngine is not installed; set false")
    for name in ("router_dead_experts_warn", "router_dead_experts_fail"):
        limit = getattr(cfg.logging, name)
        total = experts * sum(cfg.is_moe_layer(n) for n in range(1, cfg.model.num_layers + 1))
        if limit is not None and limit > total:
            yield Problem((name, "num_experts"), f"{limit} is never reached: the model has {total} routed experts")


def _schedule(cfg: RunConfig) -> Findings:
    o, t = cfg.optim, cfg.training
    if o.min_lr > o.lr:
        yield Problem(("min_lr", "lr"), f"min_lr {o.min_lr:g} is above the peak {o.lr:g}; lower min_lr")
    if o.lr_warmup_iters >= cfg.decay_iters:
        yield Problem(
            ("lr_warmup_iters", "lr_decay_iters", "train_iters"),
            f"a warm-up of {o.lr_warmup_iters} iterations leaves nothing of a schedule of {cfg.decay_iters}",
        )
    if o.lr_decay_style == "WSD" and o.lr_wsd_decay_iters is None:
        yield Problem(("lr_wsd_decay_iters",), "the WSD schedule needs the length of its final decay")
    if o.lr_decay_style != "WSD" and o.lr_wsd_decay_iters is not None:
        yield Problem(("lr_wsd_decay_iters", "lr_decay_style"), f"has no effect on the schedule {o.lr_decay_style}")
    if o.lr_wsd_decay_iters is not None and o.lr_wsd_decay_iters + o.lr_warmup_iters > cfg.decay_iters:
        yield Problem(
            ("lr_wsd_decay_iters", "lr_warmup_iters", "lr_decay_iters"),
            f"warm-up {o.lr_warmup_iters} and final decay {o.lr_wsd_decay_iters} exceed {cfg.decay_iters} iterations",
        )
    if (t.nonfinite_policy == "skip") != (t.nonfinite_max_skips > 0):
        yield Problem(
            ("nonfinite_policy", "nonfinite_max_skips"),
            f"the policy {t.nonfinite_policy} does not go with {t.nonfinite_max_skips} permitted skips",
        )
    if t.kd_span_weight_reasoning == 0 and t.kd_span_weight_final == 0:
        yield Problem(("kd_span_weight_reasoning", "kd_span_weight_final"), "both are 0, so nothing would be learnt")


def _intervals(cfg: RunConfig) -> Findings:
    save, keep = cfg.checkpoint.save_interval, cfg.checkpoint.keep_every
    if keep is not None and (save is None or keep % save):
        yield Problem(("keep_every", "save_interval"), f"{keep} is not a multiple of {save}, so nothing would be kept")
    for field in ("dead_experts_{}", "max_load_{}_pct", "cv_{}_pct", "max_vio_{}", "drop_rate_{}_pct"):
        warn_name, fail_name = (f"router_{field.format(kind)}" for kind in ("warn", "fail"))
        warn, fail = getattr(cfg.logging, warn_name), getattr(cfg.logging, fail_name)
        if warn is not None and fail is not None and fail < warn:
            yield Problem((fail_name, warn_name), f"fails at {fail}, warns at {warn}")


def _trained(cfg: RunConfig) -> Findings:
    patterns = cfg.training.train_only
    if patterns is None:
        return
    if not patterns:
        yield Problem(("train_only",), "an empty list trains nothing; null trains everything")
    names = list(parameter_sizes(cfg))
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, 3, 0.0)
            yield Problem(("train_only",), f"no parameter matches {pattern!r}; near: {', '.join(near)}")
    bare = [n for n in names if _is_fused_bias(n) and is_trained(cfg, n) and not is_trained(cfg, _weight_of(n))]
    if bare:
        yield Problem(
            ("train_only",),
            f"{bare[0]} is trained and its matrix is not: Megatron-Core's linear gives the bias of a frozen matrix no "
            f"gradient; add {_weight_of(bare[0])}, or leave the bias out",
        )


def _is_fused_bias(name: str) -> bool:
    """Of a matrix that adds its bias itself."""
    return name.endswith((".linear_qkv.bias", ".linear_tpa_a.bias"))


def _weight_of(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"


_UNSUPPORTED = {
    "context_parallel_size": "a rank would have the keys of its own part of a row, and no attention backend fetches "
    "the rest of a window or a document from the other ranks",
}


def _parallel(cfg: RunConfig) -> Findings:
    for name, reason in _UNSUPPORTED.items():
        size = getattr(cfg.parallel, name)
        if size > 1:
            yield Problem(
                (name,), f"{size} is not supported: {reason}; set 1 and use tensor parallelism with sequence_parallel"
            )
    yield from _tensor_parallel(cfg)
    ep, experts = cfg.parallel.expert_model_parallel_size, cfg.moe.num_experts
    if ep > 1 and experts is None:
        yield Problem(("expert_model_parallel_size", "num_experts"), f"{ep} ranks, and no experts to share")
    elif experts is not None and experts % ep:
        yield Problem(
            ("num_experts", "expert_model_parallel_size"), f"{experts} experts cannot be spread evenly over {ep} ranks"
        )
    t = cfg.training
    if t.global_batch_size % t.micro_batch_size:
        yield Problem(
            ("global_batch_size", "micro_batch_size"),
            f"{t.global_batch_size} rows are not a whole number of micro-batches of {t.micro_batch_size}",
        )


def _tensor_parallel(cfg: RunConfig) -> Findings:
    ranks, m, moe = cfg.parallel.tensor_model_parallel_size, cfg.model, cfg.moe
    name = "tensor_model_parallel_size"
    if ranks == 1:
        if cfg.parallel.sequence_parallel:
            yield Problem(("sequence_parallel", name), "shares the sequence of tensor-parallel ranks and there is one")
        return
    shared_out: dict[str, int | None] = {
        "num_attention_heads": m.num_attention_heads,
        "num_query_groups": m.num_query_groups,
        "padded_vocab_size": m.padded_vocab_size,
    }
    if not all(cfg.is_moe_layer(n) for n in range(1, m.num_layers + 1)):
        shared_out["ffn_hidden_size"] = m.ffn_hidden_size
    if moe.num_experts is not None:
        shared_out["moe_shared_expert_intermediate_size"] = moe.moe_shared_expert_intermediate_size
    if cfg.parallel.sequence_parallel:
        shared_out["seq_length"] = cfg.data.seq_length
    for field, size in shared_out.items():
        if size is not None and size % ranks:
            yield Problem((field, name), f"{size} cannot be split evenly over {ranks} ranks; set a divisor of it")
    if moe.num_experts is not None and not cfg.parallel.sequence_parallel:
        yield Problem(
            ("sequence_parallel", name, "num_experts"),
            "without it every tensor-parallel rank would send every token to the experts; set sequence_parallel true",
        )


def _world(cfg: RunConfig, world_size: int) -> Findings:
    p, t = cfg.parallel, cfg.training
    if p.context_parallel_size > 1:
        return  # already refused, and the data-parallel size would mean nothing
    stages, shards = p.pipeline_model_parallel_size, p.tensor_model_parallel_size
    for name, size, what in (
        ("pipeline_model_parallel_size", stages, f"pipelines of {stages} stages"),
        ("tensor_model_parallel_size", stages * shards, f"tensor-parallel groups of {shards}"),
    ):
        if world_size % size:
            of_stages = f" over {stages} stages" if stages > 1 and size > stages else ""
            yield Problem((name, "nproc_per_node"), f"{world_size} processes cannot be divided into {what}{of_stages}")
            return
    if world_size // stages % p.expert_model_parallel_size:
        yield Problem(
            ("expert_model_parallel_size", "nproc_per_node"),
            f"{world_size // stages} processes{' of each stage' if stages > 1 else ''} cannot be divided into expert "
            f"groups of {p.expert_model_parallel_size}",
        )
    replicas = world_size // (stages * shards)
    rows = t.micro_batch_size * replicas
    if t.global_batch_size % t.micro_batch_size == 0 and t.global_batch_size % rows:
        yield Problem(
            ("global_batch_size", "micro_batch_size", "nproc_per_node"),
            f"{t.global_batch_size} rows are not a multiple of {t.micro_batch_size} x {replicas} data-parallel ranks "
            f"= {rows}",
        )


def _data(cfg: RunConfig) -> Findings:
    yield from (Problem(names, text) for names, text in blend_problems(cfg.data))


def _pipeline(cfg: RunConfig) -> Findings:
    yield from (Problem(names, text) for names, text in pipeline_problems(cfg))


def _recomputation(cfg: RunConfig) -> Findings:
    yield from (Problem(names, text) for names, text in recomputation_problems(cfg))


_RULES: tuple[Callable[[RunConfig], Findings], ...] = (
    _architecture,
    _backend,
    _experts,
    _schedule,
    _trained,
    _intervals,
    _parallel,
    _pipeline,
    _recomputation,
    _data,
)


def find_problems(cfg: RunConfig, world_size: int | None = None) -> list[Problem]:
    """Every broken rule of ``cfg``.

    Args:
        cfg: a configuration whose single fields are valid.
        world_size: processes over all nodes; None leaves out the rules that depend on it.
    """
    found = [problem for rule in _RULES for problem in rule(cfg)]
    return found if world_size is None else [*found, *_world(cfg, world_size)]
