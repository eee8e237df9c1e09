"""What a run minimises: one file an objective, one registry line each; the loop knows none of them.

An objective sees a model output and a batch and returns a loss that is already divided by counts over the whole global
batch. Summing over micro-batches and data-parallel ranks therefore gives the same loss and the same gradients however
the batch is split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_vpmoe.objectives.interface import Objective, ObjectiveResult, TokenLosses
from megatron_vpmoe.objectives.span_ce import SpanCE
from megatron_vpmoe.objectives.token_ce import TokenCE

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

__all__ = ["OBJECTIVES", "Objective", "ObjectiveResult", "SpanCE", "TokenCE", "TokenLosses", "build_objective"]

OBJECTIVES: dict[str, Callable[[RunConfig], Objective]] = {
    "span_ce": SpanCE.from_config,
    "token_ce": TokenCE.from_config,
}


def build_objective(cfg: RunConfig) -> Objective:
    """The objective that ``training.objective`` names."""
    return OBJECTIVES[cfg.training.objective](cfg)
