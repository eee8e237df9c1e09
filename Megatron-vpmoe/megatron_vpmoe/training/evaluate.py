"""Validation: the objective over the validation split, normalised over the whole split."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.objectives import Objective
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.training.step import global_totals, run_micro_batches

Validation = Callable[[StopRequest], dict[str, float]]
"""What gives the metrics of one validation pass; a collective, which ends in ``Interrupted`` where a stop is asked."""


def validation(model: VPModel, objective: Objective, batches: Iterable[Batch]) -> Validation:
    """``evaluate`` over the same batches each time."""
    return lambda stop: evaluate(model, objective, batches, stop.check())


@torch.no_grad()
def evaluate(
    model: VPModel, objective: Objective, batches: Iterable[Batch], check: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The objective's metrics over ``batches`` of all data-parallel ranks.

    Args:
        model: the bare model; its training mode is restored afterwards.
        batches: this rank's share; every rank must pass equally many (expert-parallel ranks exchange tokens).
        check: called before each forward pass; may raise.
    """
    batches = list(batches)
    totals = global_totals(objective, batches)
    was_training = model.training
    model.eval()
    try:
        return run_micro_batches(model, objective, batches, totals, forward_only=True, check=check)
    finally:
        model.train(was_training)
