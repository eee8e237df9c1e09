"""One optimizer step: forward and backward over this rank's micro-batches, global normalisation, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import ModelOutput, VPModel
from megatron_vpmoe.model.moe.replay import ROUTING, replaying
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.objectives import Objective
from megatron_vpmoe.optim import VpOptimizer
from megatron_vpmoe.runtime import distributed, pulse, stages
from megatron_vpmoe.runtime.device import current_device
from megatron_vpmoe.runtime.ranges import annotated


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        metrics: the objective's metrics over the global batch, and ``tokens/real``.
        grad_norm: global gradient norm before clipping; NaN or infinite when the gradient was.
        updated: whether the parameters moved.
        groups: norms and update sizes by assignment rule, where they were to be measured and the parameters moved.
    """

    metrics: dict[str, float]
    grad_norm: float
    updated: bool
    groups: dict[str, float] = field(default_factory=dict)


def global_totals(objective: Objective, batches: list[Batch]) -> dict[str, float]:
    """The counts that normalise a global batch, summed over all micro-batches and data-parallel ranks first."""
    counts = {key: float(value) for key, value in objective.counts(batches).items()}
    counts["tokens/real"] = float(sum(batch.real_tokens for batch in batches))
    with annotated("communication"):
        return distributed.sum_over_ranks(counts)


def layout_of(batch: Batch, host: Batch | None = None) -> SequenceLayout:
    """What attention needs to know of a batch; ``host``: the same batch where it came from."""
    rows = None if host is None else (host.tokens, host.document_id)
    return SequenceLayout(document_id=batch.document_id, position=batch.position_ids, recurs=True, rows_on_host=rows)


def train_step(
    model: DistributedDataParallel,
    optimizer: VpOptimizer,
    objective: Objective,
    batches: list[Batch],
    check: Callable[[], None] = lambda: None,
    accepts: Callable[[float], bool] = lambda _: True,
    *,
    measure: bool = False,
) -> StepResult:
    """Run one step; neither parameters nor expert biases move when the loss or the gradient is not finite.

    The loss of a micro-batch is a sum of per-token terms already divided by the global totals, so that gradients are
    plain sums over micro-batches and ranks.

    From the start of the forward pass to the update the host waits for the device once: for metrics and norm together.

    Args:
        batches: this rank's micro-batches, on the CPU.
        check: called before each micro-batch; what it raises leaves parameters and expert biases as they were.
        accepts: whether a step with this loss, of the global batch, may move anything; the same on every rank.
        measure: also take norms and update sizes by assignment rule, for which the host waits once the update is made.
    """
    totals = global_totals(objective, batches)
    biases = [
        (bias, router.weight.requires_grad)
        for router in model.modules()
        if isinstance(router, VPMoERouter) and (bias := router.expert_bias) is not None
    ]
    before = torch.stack([bias for bias, _ in biases]) if biases else ()
    model.zero_grad_buffer()
    optimizer.zero_grad()
    names, summed = _run(model, objective, batches, totals, forward_only=False, check=check)
    with annotated("optimizer"):
        optimizer.prepare_grads()
        *sums, squared_norm = torch.cat([summed, optimizer.squared_grad_norm().view(1)]).tolist()
        metrics = _global_metrics(objective, totals, names, sums)
        grad_norm = math.sqrt(squared_norm) if math.isfinite(metrics["loss/total"]) else math.nan
        groups: dict[str, float] = {}
        if updated := accepts(metrics["loss/total"]) and math.isfinite(grad_norm):
            groups = optimizer.update(grad_norm, measure=measure)
    # Finalising the gradients has moved the expert biases already, those of frozen routers too.
    for (bias, is_router_trained), as_it_was in zip(biases, before, strict=True):
        if not (updated and is_router_trained):
            bias.copy_(as_it_was)
    return StepResult(metrics, grad_norm, updated, groups)


def run_micro_batches(
    model: DistributedDataParallel | VPModel,
    objective: Objective,
    batches: list[Batch],
    totals: dict[str, float],
    *,
    forward_only: bool,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Run Megatron-Core's schedule over the micro-batches (1F1B where there are pipeline stages); a collective.

    Args:
        model: in training the wrapped one, whose gradients are finalised.
        batches: the same on every stage of a pipeline, on the CPU.
        totals: of ``global_totals``.
        forward_only: leave out the backward passes.
        check: called before each micro-batch, but in a pipeline only before the first: its stages are never at one.

    Returns:
        the objective's metrics over the global batch, on every rank.
    """
    names, summed = _run(model, objective, batches, totals, forward_only=forward_only, check=check)
    return _global_metrics(objective, totals, names, summed.tolist())


def _run(
    model: DistributedDataParallel | VPModel,
    objective: Objective,
    batches: list[Batch],
    totals: dict[str, float],
    *,
    forward_only: bool,
    check: Callable[[], None],
) -> tuple[list[str], Tensor]:
    """``run_micro_batches``; the metrics' names and, on the device, fp64 values. None but on the last stage."""
    unwrapped: VPModel = model if isinstance(model, VPModel) else cast(VPModel, model.module)
    unwrapped.config.grad_scale_func = partial(_scaled, totals["tokens/real"])
    is_pipeline = unwrapped.stage.count > 1
    if is_pipeline:
        check()
    collected = get_forward_backward_func()(
        forward_step_func=_forward_step(objective, totals, pulse.beat if is_pipeline else check),
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
        adjust_tensor_shapes_fn=unwrapped.wire.adjust_shapes if is_pipeline else None,
    )
    if not unwrapped.stage.is_last:
        return [], torch.empty(0, dtype=torch.float64, device=current_device())
    values = torch.stack([value.double() for metrics in collected for value in metrics.values()])
    return list(collected[0]), distributed.summed_over_ranks(values.view(len(collected), -1).sum(0))


def _scaled(real_tokens: float, of: Tensor) -> Tensor:
    """What upstream differentiates: a loss of ours as it is; the scale of the router's, which is a sum over tokens,
    divided by those of the global batch.
    """
    return of if of.requires_grad else of / real_tokens


def _forward_step(objective: Objective, totals: dict[str, float], check: Callable[[], None]) -> Callable[..., Any]:
    def loss_of(batch: Batch, output: ModelOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with annotated("loss"):
            result = objective(output, batch, totals)
        return result.loss, torch.zeros((), dtype=torch.int), result.metrics  # of tokens upstream need know none

    def forward_step(
        data_iterator: Iterator[Batch], model: DistributedDataParallel | VPModel
    ) -> tuple[ModelOutput | Tensor, Any]:
        check()
        host = next(data_iterator)
        batch = host.to(current_device())
        with replaying(model, batch.annotations.get(ROUTING), batch.recorded_id):
            output = model(batch.tokens, layout_of(batch, host))
        return output, partial(loss_of, batch)

    return forward_step


def _global_metrics(
    objective: Objective, totals: dict[str, float], names: list[str], summed: list[float]
) -> dict[str, float]:
    """On every stage: the last one's sums by name, and what follows from the counts."""
    measured = dict(zip(names, summed, strict=True))
    told = stages.from_last_stage(measured or None)
    return {**objective.of_sums(told), **objective.summary(totals), "tokens/real": totals["tokens/real"]}
