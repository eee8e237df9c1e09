"""One optimizer step: forward and backward over this rank's micro-batches, global normalisation, update."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
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
from megatron_vpmoe.runtime import distributed, stages
from megatron_vpmoe.runtime.device import current_device
from megatron_vpmoe.runtime.ranges import annotated


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        metrics: the objective's metrics over the global batch, and ``tokens/real``.
        grad_norm: global gradient norm before clipping; NaN or infinite when the gradient was.
        updated: whether the parameters moved.
    """

    metrics: dict[str, float]
    grad_norm: float
    updated: bool


def global_totals(objective: Objective, batches: list[Batch]) -> dict[str, float]:
    """The counts that normalise a global batch, summed over all micro-batches and data-parallel ranks first."""
    counts = {key: float(value) for key, value in objective.counts(batches).items()}
    counts["tokens/real"] = float(sum(batch.real_tokens for batch in batches))
    with annotated("communication"):
        return distributed.sum_over_ranks(counts)


def layout_of(batch: Batch) -> SequenceLayout:
    """What attention needs to know of a batch."""
    return SequenceLayout(document_id=batch.document_id, position=batch.position_ids, recurs=True)


def train_step(
    model: DistributedDataParallel,
    optimizer: VpOptimizer,
    objective: Objective,
    batches: list[Batch],
    check: Callable[[], None] = lambda: None,
) -> StepResult:
    """Run one step; neither parameters nor expert biases move when the loss or the gradient is not finite.

    The loss of a micro-batch is a sum of per-token terms already divided by the global totals, so that gradients are
    plain sums over micro-batches and ranks. Megatron-Core's per-token convention divides the summed gradient by the
    number of real tokens; the loss is multiplied by the same number first, and the router's balance loss, which
    upstream weighs by tokens, comes out right.

    Args:
        batches: this rank's micro-batches, on the CPU.
        check: called before each micro-batch; what it raises leaves parameters and expert biases as they were.
    """
    totals = global_totals(objective, batches)
    biases = [
        (bias, bias.clone(), router.weight.requires_grad)
        for router in model.modules()
        if isinstance(router, VPMoERouter) and (bias := router.expert_bias) is not None
    ]
    model.zero_grad_buffer()
    optimizer.zero_grad()
    metrics = run_micro_batches(model, objective, batches, totals, forward_only=False, check=check)
    updated, grad_norm = False, math.nan
    if math.isfinite(metrics["loss/total"]):
        with annotated("optimizer"):
            updated, grad_norm, _ = optimizer.step()
    # Finalising the gradients has moved the expert biases already, those of frozen routers too.
    for bias, before, is_router_trained in biases:
        if not (updated and is_router_trained):
            bias.copy_(before)
    return StepResult(metrics, grad_norm, updated)


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
    unwrapped: VPModel = model if isinstance(model, VPModel) else cast(VPModel, model.module)
    is_pipeline = unwrapped.stage.count > 1
    if is_pipeline:
        check()
    collected = get_forward_backward_func()(
        forward_step_func=_forward_step(objective, totals, (lambda: None) if is_pipeline else check),
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
        adjust_tensor_shapes_fn=unwrapped.wire.adjust_shapes if is_pipeline else None,
    )
    return stages.from_last_stage(_global_metrics(objective, collected, totals) if unwrapped.stage.is_last else None)


def _forward_step(objective: Objective, totals: dict[str, float], check: Callable[[], None]) -> Callable[..., Any]:
    real_tokens = totals["tokens/real"]

    def loss_of(batch: Batch, count: int, output: ModelOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with annotated("loss"):
            result = objective(output, batch, totals)
        # Filled there: a tensor made here is copied, and a copy waits for all that the device was given.
        num_tokens = torch.full((), count, dtype=torch.int, device=result.loss.device)
        return result.loss * real_tokens, num_tokens, result.metrics

    def forward_step(
        data_iterator: Iterator[Batch], model: DistributedDataParallel | VPModel
    ) -> tuple[ModelOutput | Tensor, Any]:
        check()
        here = next(data_iterator)
        batch = here.to(current_device())
        with replaying(model, batch.annotations.get(ROUTING), batch.recorded_id):
            output = model(batch.tokens, layout_of(batch))
        return output, partial(loss_of, batch, here.real_tokens)

    return forward_step


def _global_metrics(
    objective: Objective, collected: list[dict[str, Tensor]], totals: dict[str, float]
) -> dict[str, float]:
    """Per-micro-batch metrics summed over micro-batches and data-parallel ranks, and what follows from the counts."""
    local = {key: reduce(operator.add, (metrics[key].double() for metrics in collected)) for key in collected[0]}
    return {**distributed.sum_over_ranks(local), **objective.summary(totals), "tokens/real": totals["tokens/real"]}
