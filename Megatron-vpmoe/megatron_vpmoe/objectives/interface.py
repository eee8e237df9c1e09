"""The interface between the loop and an objective.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import Batch

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.model.output import ModelOutput


@dataclass(frozen=True)
class Needs:
    """What an objective needs; a run that lacks some of it is refused at its start, by name.

    Attributes:
        annotations: of every batch, as declared here; of a width at least that, None takes any.
        pairs: datasets of preference pairs, and no others.
        depends_on_weights: batches have to come from the weights that are trained.
        experts: the model has to have routed experts.
    """

    annotations: tuple[Annotation, ...] = ()
    pairs: bool = False
    depends_on_weights: bool = False
    experts: bool = False


@dataclass(frozen=True)
class ObjectiveResult:
    """One micro-batch's share of the global batch's loss.

    Attributes:
        loss: 0-d, differentiable; the sum over all micro-batches and ranks is the global loss.
        metrics: tag -> 0-d tensor without gradient; summed over micro-batches and ranks they are the global values.
            ``loss/total`` has to be among them. What is no sum is made of such by ``Objective.of_sums``.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(ABC):
    """A loss over a global batch.

    It may keep state from step to step. ``begin_step`` and ``end_step`` are called with the same arguments on every
    rank, so that what it makes of them is the same everywhere; a checkpoint keeps ``state``.

    Attributes:
        needs: of model, batch and source.
    """

    @property
    def needs(self) -> Needs:
        """What of model, batch and source; known before there is any of them."""
        return Needs()

    @classmethod
    def from_config(cls, cfg: RunConfig) -> Self:
        """For a run; without settings of its own, as it stands."""
        return cls()

    def begin_step(self, step: int) -> None:  # noqa: B027
        """Before a training step, from 1; again for one given up; validation comes under the step before it."""

    def end_step(self, metrics: dict[str, float]) -> None:  # noqa: B027
        """After a step that moved the weights, with its metrics over the global batch."""

    def state(self) -> dict[str, Any]:
        """What it has to keep to go on, JSON-ready; the same on every rank."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from what ``state`` gave."""

    @abstractmethod
    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """This rank's share of the counts that the loss is divided by; the keys are metric tags."""

    @abstractmethod
    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """One micro-batch's share of the loss.

        Args:
            output: of the model, for ``batch``; to be read in one of its three ways.
            totals: ``counts`` summed over all micro-batches and data-parallel ranks.
        """

    def of_sums(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics of ``ObjectiveResult.metrics`` summed over the global batch; what is no sum is made of them here."""
        return sums

    def summary(self, totals: dict[str, float]) -> dict[str, float]:
        """Metrics that follow from the global counts alone and must not be summed: the counts, effective weights."""
        return dict(totals)
