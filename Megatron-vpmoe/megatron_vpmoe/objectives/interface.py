"""The interface between the loop and an objective.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from megatron_vpmoe.data.batch import Batch


class TokenLosses(Protocol):
    """What an objective needs of a model output."""

    def cross_entropy(self, labels_BS: Tensor, mask_BS: Tensor, weight_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Σ weight · -log p(label) where the mask holds, and each -log p(label).

        The weights come first because the gradient of an output projection is a sum over tokens: with them it can be
        made while logits exist, which are then neither kept nor computed twice.

        Returns:
            fp32 0-d, differentiable; fp32 [mask.sum()] in row-major order, without gradient.
        """
        ...


@dataclass(frozen=True)
class ObjectiveResult:
    """One micro-batch's share of the global batch's loss.

    Attributes:
        loss: 0-d, differentiable; the sum over all micro-batches and ranks is the global loss.
        metrics: tag -> 0-d tensor without gradient; summed over micro-batches and ranks they are the global values.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """A loss over a global batch.

    Attributes:
        of_pairs: it reads preference datasets, and no other.
    """

    of_pairs: ClassVar[bool]

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """This rank's share of the counts that the loss is divided by; the keys are metric tags."""
        ...

    def __call__(self, output: TokenLosses, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """One micro-batch's share of the loss.

        Args:
            output: of the model, for ``batch``.
            totals: ``counts`` summed over all micro-batches and data-parallel ranks.
        """
        ...

    def summary(self, totals: dict[str, float]) -> dict[str, float]:
        """Metrics that follow from the global counts alone and must not be summed: the counts, effective weights."""
        ...
