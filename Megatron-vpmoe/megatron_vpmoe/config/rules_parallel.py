"""Rules of the processes: what tensor-, expert- and pipeline-parallel ranks can share, and which numbers of them go."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatron_vpmoe.config.geometry import stage_layers
from megatron_vpmoe.config.rule import Facts, Rule, getter
from megatron_vpmoe.config.rules_model import layers
from megatron_vpmoe.config.schema import RunConfig

_TP, _EP, _PP = "tensor_model_parallel_size", "expert_model_parallel_size", "pipeline_model_parallel_size"
_FIRST, _LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
_ALWAYS = ("num_attention_heads", "num_query_groups", "padded_vocab_size")


def _has_dense(cfg: RunConfig) -> bool:
    return not all(cfg.is_moe_layer(n) for n in layers(cfg))


_SPLIT: dict[str, Callable[[RunConfig], bool]] = {
    **dict.fromkeys(_ALWAYS, lambda c: True),
    "ffn_hidden_size": _has_dense,
    "moe_shared_expert_intermediate_size": lambda c: c.moe.num_experts is not None,
    "seq_length": lambda c: c.parallel.sequence_parallel,
}
"""What tensor-parallel ranks share out, and whether this model has it."""


def _splits_unevenly(name: str, cfg: RunConfig) -> bool:
    size = getter(cfg, name)
    return size is not None and _SPLIT[name](cfg) and size % cfg.parallel.tensor_model_parallel_size != 0


def _several(name: str, cfg: RunConfig) -> bool:
    return getter(cfg, name) > 1


def _left(cfg: RunConfig) -> tuple[int, int]:
    """(layers, stages) without the first and last stage where those have a number of layers of their own."""
    first, last = cfg.parallel.num_layers_in_first_pipeline_stage, cfg.parallel.num_layers_in_last_pipeline_stage
    stages = cfg.parallel.pipeline_model_parallel_size - (first is not None) - (last is not None)
    return cfg.model.num_layers - (first or 0) - (last or 0), stages


def _unfilled(cfg: RunConfig) -> bool:
    left, stages = _left(cfg)
    return _several(_PP, cfg) and (left < stages or (stages == 0 and left != 0))


def _uneven(cfg: RunConfig) -> bool:
    left, stages = _left(cfg)
    return _several(_PP, cfg) and not _unfilled(cfg) and stages > 0 and left % stages != 0


def _stages(cfg: RunConfig) -> list[range]:
    """The stages of a pipeline that can be cut, else none."""
    return stage_layers(cfg) if _several(_PP, cfg) and not _unfilled(cfg) and not _uneven(cfg) else []


def _without_experts(cfg: RunConfig) -> list[Facts]:
    found = [n for n, stage in enumerate(_stages(cfg)) if not any(cfg.is_moe_layer(layer) for layer in stage)]
    return [{"stage": number} for number in found if cfg.moe.num_experts is not None]


def _more_than_a_stage(cfg: RunConfig) -> list[Facts]:
    again, largest = cfg.training.recompute_num_layers, max((len(stage) for stage in _stages(cfg)), default=0)
    too_many = again is not None and 0 < largest < again <= cfg.model.num_layers
    return [{"largest": largest}] if too_many else []


REFUSED: tuple[Rule, ...] = (
    Rule(
        ("sequence_parallel", _TP),
        "shares the sequence of tensor-parallel ranks and there is one",
        lambda c: c.parallel.sequence_parallel and not _several(_TP, c),
    ),
    *(
        Rule(
            (name, _TP),
            f"{{{name}}} cannot be split evenly over {{{_TP}}} ranks; set a divisor of it",
            partial(_splits_unevenly, name),
        )
        for name in _SPLIT
    ),
    Rule(
        ("sequence_parallel", _TP, "num_experts"),
        "without it every tensor-parallel rank would send every token to the experts; set sequence_parallel true",
        lambda c: _several(_TP, c) and c.moe.num_experts is not None and not c.parallel.sequence_parallel,
    ),
    Rule(
        (_EP, "num_experts"),
        f"{{{_EP}}} ranks, and no experts to share",
        lambda c: _several(_EP, c) and c.moe.num_experts is None,
    ),
    Rule(
        ("num_experts", _EP),
        f"{{num_experts}} experts cannot be spread evenly over {{{_EP}}} ranks",
        lambda c: (c.moe.num_experts or 0) % c.parallel.expert_model_parallel_size != 0,
    ),
    *(
        Rule(
            (name, _PP),
            "has no effect on a single stage; set it to null",
            partial(lambda name, c: getter(c, name) is not None and not _several(_PP, c), name),
        )
        for name in (_FIRST, _LAST)
    ),
    *(
        Rule(
            (_PP, other),
            f"no test has shown yet that it equals one process together with {other}; set one of them to 1",
            partial(lambda other, c: _several(_PP, c) and _several(other, c), other),
        )
        for other in (_TP, _EP)
    ),
    Rule(
        ("num_layers", _PP, _FIRST, _LAST),
        f"{{num_layers}} layers do not fill {{{_PP}}} stages with {{first}} in the first and {{last}} in the last",
        lambda c: _unfilled(c) and [{
            "first": c.parallel.num_layers_in_first_pipeline_stage or "any number of",
            "last": c.parallel.num_layers_in_last_pipeline_stage or "any number of",
        }],
    ),
    Rule(
        ("num_layers", _PP, _FIRST, _LAST),
        "{layers_left} layers cannot be shared out evenly over {stages_left} stages; "
        "give the first or the last stage a number of its own (--num-layers-in-last-pipeline-stage)",
        lambda c: _uneven(c) and [dict(zip(("layers_left", "stages_left"), _left(c), strict=True))],
    ),
    Rule(
        (_PP, _FIRST, "first_layer_dense"),
        "stage {stage} holds no layer with experts, and the experts' gradient norm and optimizer state are exchanged "
        "between stages; give it another layer",
        _without_experts,
    ),
    Rule(
        ("recompute_num_layers", _PP),
        "{recompute_num_layers} layers of a stage, and the largest stage has {largest}",
        _more_than_a_stage,
    ),
)  # fmt: skip
"""What the sizes of parallelism demand of the model and of each other."""

# The number of processes over all nodes.


def _undivided(cfg: RunConfig, world: int) -> str | None:
    """The first of pipelines, and tensor-parallel groups inside them, that the processes do not make up."""
    stages, ranks = cfg.parallel.pipeline_model_parallel_size, cfg.parallel.tensor_model_parallel_size
    return _PP if world % stages else _TP if world % (stages * ranks) else None


def _of_stages(cfg: RunConfig, before: str) -> str:
    stages = cfg.parallel.pipeline_model_parallel_size
    return "" if stages == 1 else before.format(stages=stages)


def _expert_groups(cfg: RunConfig, world: int) -> list[Facts]:
    processes = world // cfg.parallel.pipeline_model_parallel_size
    broken = not _undivided(cfg, world) and processes % cfg.parallel.expert_model_parallel_size
    return [{"processes": processes, "maybe_of_each": _of_stages(cfg, " of each stage")}] if broken else []


def _batch(cfg: RunConfig, world: int) -> list[Facts]:
    p, t = cfg.parallel, cfg.training
    replicas = world // (p.pipeline_model_parallel_size * p.tensor_model_parallel_size)
    rows = t.micro_batch_size * replicas
    if _undivided(cfg, world) or t.global_batch_size % t.micro_batch_size or not t.global_batch_size % rows:
        return []
    return [{"replicas": replicas, "rows": rows}]


OF_WORLD: tuple[Rule, ...] = (
    Rule(
        (_PP, "nproc_per_node"),
        f"{{processes}} processes cannot be divided into pipelines of {{{_PP}}} stages",
        lambda c, world: _undivided(c, world) == _PP and [{"processes": world}],
        of_world=True,
    ),
    Rule(
        (_TP, "nproc_per_node"),
        f"{{processes}} processes cannot be divided into tensor-parallel groups of {{{_TP}}}{{maybe_over}}",
        lambda c, world: _undivided(c, world) == _TP and [
            {"processes": world, "maybe_over": _of_stages(c, " over {stages} stages")}
        ],
        of_world=True,
    ),
    Rule(
        (_EP, "nproc_per_node"),
        f"{{processes}} processes{{maybe_of_each}} cannot be divided into expert groups of {{{_EP}}}",
        _expert_groups,
        of_world=True,
    ),
    Rule(
        ("global_batch_size", "micro_batch_size", "nproc_per_node"),
        "{global_batch_size} rows are not a multiple of {micro_batch_size} x {replicas} data-parallel ranks = {rows}",
        _batch,
        of_world=True,
    ),
)  # fmt: skip
"""What the number of processes has to be."""
