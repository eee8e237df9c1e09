"""How the layers are shared out over pipeline stages, and what the fields about it demand of each other."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vpmoe.config.schema import RunConfig

Findings = Iterator[tuple[tuple[str, ...], str]]

_SIZE = "pipeline_model_parallel_size"
_FIRST, _LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"


def stage_layers(cfg: RunConfig) -> list[range]:
    """The layer numbers (from 1) of each pipeline stage: Megatron's division, of a configuration without problems."""
    p, size = cfg.parallel, cfg.parallel.pipeline_model_parallel_size
    first, last = p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage
    middle = size - (first is not None) - (last is not None)
    even = (cfg.model.num_layers - (first or 0) - (last or 0)) // middle if middle else 0
    counts = [even] * size
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    ends = [sum(counts[: stage + 1]) for stage in range(size)]
    return [range(end - count + 1, end + 1) for count, end in zip(counts, ends, strict=True)]


def pipeline_problems(cfg: RunConfig) -> Findings:
    """(fields, what is wrong) for stages that cannot be built, or not trained rightly."""
    p, layers = cfg.parallel, cfg.model.num_layers
    size = p.pipeline_model_parallel_size
    first, last = p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage
    if p.virtual_pipeline_model_parallel_size is not None:
        yield (
            ("virtual_pipeline_model_parallel_size",),
            "the interleaved schedule sends tensors of one fixed shape, without room for layer 1's values; set null",
        )
    if size == 1:
        for name in (_FIRST, _LAST):
            if getattr(p, name) is not None:
                yield (name, _SIZE), "has no effect on a single stage; set it to null"
        return
    for other in ("tensor_model_parallel_size", "expert_model_parallel_size"):
        if getattr(p, other) > 1:
            yield (
                (_SIZE, other),
                f"no test has shown yet that it equals one process together with {other}; set one of them to 1",
            )
    uneven = (first is not None) + (last is not None)
    left, stages = layers - (first or 0) - (last or 0), size - uneven
    if left < stages or (stages == 0 and left):
        yield (
            ("num_layers", _SIZE, _FIRST, _LAST),
            f"{layers} layers do not fill {size} stages with {first or 'any number of'} in the first and "
            f"{last or 'any number of'} in the last",
        )
    elif stages and left % stages:
        yield (
            ("num_layers", _SIZE, _FIRST, _LAST),
            f"{left} layers cannot be shared out evenly over {stages} stages; "
            f"give the first or the last stage a number of its own (--num-layers-in-last-pipeline-stage)",
        )
    else:
        yield from _stage_problems(cfg)


def _stage_problems(cfg: RunConfig) -> Findings:
    stages = stage_layers(cfg)
    if cfg.moe.num_experts is not None:
        for number, layers in enumerate(stages):
            if not any(cfg.is_moe_layer(n) for n in layers):
                yield (
                    (_SIZE, _FIRST, "first_layer_dense"),
                    f"stage {number} holds no layer with experts, and the experts' gradient norm and optimizer state "
                    "are exchanged between stages; give it another layer",
                )
    t = cfg.training
    largest = max(len(layers) for layers in stages)
    if t.recompute_num_layers is not None and largest < t.recompute_num_layers <= cfg.model.num_layers:
        yield (
            ("recompute_num_layers", _SIZE),
            f"{t.recompute_num_layers} layers of a stage, and the largest stage has {largest}",
        )
