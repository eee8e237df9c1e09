"""Rules of the processes: what tensor-, expert- and pipeline-parallel ranks can share, and which numbers of them go."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vpmoe.config.geometry import stage_layers
from megatron_vpmoe.config.rule import Rule, View, refuse

_TP, _EP, _PP = "tensor_model_parallel_size", "expert_model_parallel_size", "pipeline_model_parallel_size"
_FIRST, _LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
Facts = list[Mapping[str, object]]


def _splits_unevenly(name: str, c: View) -> bool:
    """Whether tensor-parallel ranks share out ``name`` in this model, and cannot."""
    present = {
        "ffn_hidden_size": not all(c.sparse),
        "moe_shared_expert_intermediate_size": c.num_experts is not None,
        "seq_length": c.sequence_parallel,
    }
    return present.get(name, True) and (c[name] or 0) % c[_TP] != 0


_SPLIT = (
    "num_attention_heads",
    "num_query_groups",
    "padded_vocab_size",
    "ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "seq_length",
)


def _left(c: View) -> tuple[int, int]:
    """(layers, stages) without the first and last stage where those have a number of layers of their own."""
    own = [c[name] for name in (_FIRST, _LAST) if c[name] is not None]
    return c.num_layers - sum(own), c[_PP] - len(own)


def _division(c: View) -> str:
    """Whether the layers fill the stages of a pipeline: "single", "unfilled", "uneven" or "even"."""
    left, stages = _left(c)
    if c[_PP] == 1:
        return "single"
    if left < stages or (stages == 0 and left):
        return "unfilled"
    return "uneven" if stages and left % stages else "even"


def _unfilled(c: View) -> Facts:
    numbers = {"first": c[_FIRST] or "any number of", "last": c[_LAST] or "any number of"}
    return [numbers] if _division(c) == "unfilled" else []


def _uneven(c: View) -> Facts:
    return [dict(zip(("layers_left", "stages_left"), _left(c), strict=True))] if _division(c) == "uneven" else []


def _without_experts(c: View) -> Facts:
    stages = stage_layers(c.cfg) if _division(c) == "even" and c.num_experts is not None else []
    return [{"stage": n} for n, stage in enumerate(stages) if not any(c.sparse[stage.start - 1 : stage.stop - 1])]


def _more_than_a_stage(c: View) -> Facts:
    largest = max(map(len, stage_layers(c.cfg))) if _division(c) == "even" else c.num_layers
    return [{"largest": largest}] if largest < (c.recompute_num_layers or 0) <= c.num_layers else []


REFUSED: tuple[Rule, ...] = (
    *(
        refuse(
            f"layer_type {name}",
            f"no way is built to share {{layer_type}} layers over ranks, and there are {{{name}}}; set it to 1",
            lambda c, name=name: c.layer_type != "transformer" and c[name] > 1,
        )
        for name in (_TP, _PP)
    ),
    refuse(
        "layer_type compile",
        "{layer_type} layers are not compiled; set compile to off",
        lambda c: c.layer_type != "transformer" and c.compile != "off",
    ),
    refuse(
        f"sequence_parallel {_TP}",
        "shares the sequence of tensor-parallel ranks and there is one",
        lambda c: c.sequence_parallel and c[_TP] == 1,
    ),
    *(
        refuse(
            f"{name} {_TP}",
            f"{{{name}}} cannot be split evenly over {{{_TP}}} ranks; set a divisor of it",
            lambda c, name=name: _splits_unevenly(name, c),
        )
        for name in _SPLIT
    ),
    refuse(
        f"compile {_TP}",
        "cannot be taken in whole with upstream's linears, which tensor-parallel ranks need; set it to off",
        lambda c: c.compile != "off" and c[_TP] > 1,
    ),
    refuse(
        "compile num_experts",
        "step compiles experts, and there are none; set it to layers",
        lambda c: c.compile == "step" and c.num_experts is None,
    ),
    refuse(
        f"compile {_EP}",
        "step cannot take in the way of tokens between expert-parallel ranks, which is asked of the device; "
        "set it to layers",
        lambda c: c.compile == "step" and c[_EP] > 1,
    ),
    refuse(
        f"sequence_parallel {_TP} num_experts",
        "without it every tensor-parallel rank would send every token to the experts; set sequence_parallel true",
        lambda c: c[_TP] > 1 and c.num_experts is not None and not c.sequence_parallel,
    ),
    refuse(
        f"{_EP} num_experts",
        f"{{{_EP}}} ranks, and no experts to share",
        lambda c: c[_EP] > 1 and c.num_experts is None,
    ),
    refuse(
        f"moe_token_dispatcher_type {_EP}",
        "moves tokens between expert-parallel ranks and there is one; set it to auto",
        lambda c: c.num_experts is not None and c[_EP] == 1 and c.moe_token_dispatcher_type != "auto",
    ),
    refuse(
        f"num_experts {_EP}",
        f"{{num_experts}} experts cannot be spread evenly over {{{_EP}}} ranks",
        lambda c: (c.num_experts or 0) % c[_EP],
    ),
    *(
        refuse(
            f"{name} {_PP}",
            "has no effect on a single stage; set it to null",
            lambda c, name=name: c[name] is not None and c[_PP] == 1,
        )
        for name in (_FIRST, _LAST)
    ),
    *(
        refuse(
            f"{_PP} {other}",
            f"no test has shown yet that it equals one process together with {other}; set one of them to 1",
            lambda c, other=other: c[_PP] > 1 and c[other] > 1,
        )
        for other in (_TP, _EP)
    ),
    refuse(
        f"num_layers {_PP} {_FIRST} {_LAST}",
        f"{{num_layers}} layers do not fill {{{_PP}}} stages with {{first}} in the first and {{last}} in the last",
        _unfilled,
    ),
    *(
        refuse(
            f"{name} {_PP}",
            "the frozen model is not cut into stages; store ahead what it says (vpmoe data), or take one stage",
            lambda c, name=name: c[_PP] > 1 and c[name] is not None,
        )
        for name in ("reference_weights", "teacher_weights")
    ),
    refuse(
        f"num_layers {_PP} {_FIRST} {_LAST}",
        "{layers_left} layers cannot be shared out evenly over {stages_left} stages; "
        "give the first or the last stage a number of its own (--num-layers-in-last-pipeline-stage)",
        _uneven,
    ),
    refuse(
        f"{_PP} {_FIRST} first_dense_layers",
        "stage {stage} holds no layer with experts, and the experts' gradient norm and optimizer state are exchanged "
        "between stages; give it another layer",
        _without_experts,
    ),
    refuse(
        f"recompute_num_layers {_PP}",
        "{recompute_num_layers} layers of a stage, and the largest stage has {largest}",
        _more_than_a_stage,
    ),
)
"""What the sizes of parallelism demand of the model and of each other."""


def _undivided(c: View) -> str | None:
    """The first of pipelines, and tensor-parallel groups inside them, that the processes do not make up."""
    if c.world is None:
        return None
    return _PP if c.world % c[_PP] else _TP if c.world % (c[_PP] * c[_TP]) else None


def _expert_groups(c: View) -> Facts:
    if c.world is None or _undivided(c) or c.world // c[_PP] % c[_EP] == 0:
        return []
    return [{"processes": c.world // c[_PP], "maybe_of_each": " of each stage" if c[_PP] > 1 else ""}]


def _batch(c: View) -> Facts:
    if c.world is None or c.samples or _undivided(c) or c.global_batch_size % c.micro_batch_size:
        return []
    replicas = c.world // (c[_PP] * c[_TP])
    rows = c.micro_batch_size * replicas
    return [{"replicas": replicas, "rows": rows}] if c.global_batch_size % rows else []


OF_WORLD: tuple[Rule, ...] = (
    refuse(
        f"{_PP} nproc_per_node",
        f"{{world}} processes cannot be divided into pipelines of {{{_PP}}} stages",
        lambda c: _undivided(c) == _PP,
    ),
    refuse(
        f"{_TP} nproc_per_node",
        f"{{world}} processes cannot be divided into tensor-parallel groups of {{{_TP}}}{{maybe_over}}",
        lambda c: _undivided(c) == _TP and [{"maybe_over": f" over {c[_PP]} stages" if c[_PP] > 1 else ""}],
    ),
    refuse(
        f"{_EP} nproc_per_node",
        f"{{processes}} processes{{maybe_of_each}} cannot be divided into expert groups of {{{_EP}}}",
        _expert_groups,
    ),
    refuse(
        "global_batch_size micro_batch_size nproc_per_node",
        "{global_batch_size} rows are not a multiple of {micro_batch_size} x {replicas} data-parallel ranks = {rows}",
        _batch,
    ),
)
"""What the number of processes has to be; nothing is found where it is not known."""
