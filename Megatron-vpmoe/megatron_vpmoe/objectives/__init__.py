"""What a run minimises: one file an objective, one registry line each; the loop knows none of them.

An objective sees a model output and a batch and returns a loss that is already divided by counts over the whole global
batch. Summing over micro-batches and data-parallel ranks therefore gives the same loss and the same gradients however
the batch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import PREFERENCE, Manifest
from megatron_vpmoe.objectives.interface import Objective, ObjectiveResult, TokenLosses
from megatron_vpmoe.objectives.span_ce import SpanCE
from megatron_vpmoe.objectives.token_ce import TokenCE

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

__all__ = [
    "OBJECTIVES",
    "Objective",
    "ObjectiveResult",
    "SpanCE",
    "TokenCE",
    "TokenLosses",
    "build_objective",
    "check_kinds",
]

OBJECTIVES: dict[str, Callable[[RunConfig], Objective]] = {
    "span_ce": SpanCE.from_config,
    "token_ce": TokenCE.from_config,
}


def check_kinds(objective: Objective, cfg: RunConfig, manifests: Sequence[Manifest]) -> None:
    """Refuse datasets of the kind that the objective does not read: pairs to prefer from, or everything else.

    Raises:
        DataError: names the dataset and its kind.
    """
    for manifest in manifests:
        if (manifest.kind == PREFERENCE) != objective.of_pairs:
            wanted = f"reads {PREFERENCE}" if objective.of_pairs else f"does not read {PREFERENCE}"
            raise DataError(
                f"{cfg.training.objective} {wanted}, and the dataset is of kind {manifest.kind}",
                source=str(manifest.path),
                remedy="name another dataset, or another objective; rejected answers are not to be imitated",
            )


def build_objective(cfg: RunConfig) -> Objective:
    """The objective that ``training.objective`` names."""
    return OBJECTIVES[cfg.training.objective](cfg)
