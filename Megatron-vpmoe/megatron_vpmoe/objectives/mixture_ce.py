"""Cross-entropy of a mixture less the entropy of its router's weights: L = CE - c H(w), means over supervised tokens.

Early on an expert that happens to be ahead would be all that is trained for; the entropy keeps the others in until it
shows what they are good for. c falls evenly from ``mixture_entropy_coeff`` at the first step to 0 at the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

from torch import Tensor

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.output.terms import at_places
from megatron_vpmoe.objectives.interface import ObjectiveResult
from megatron_vpmoe.objectives.token_ce import TokenCE
from megatron_vpmoe.think.router import entropy

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.model.output import ModelOutput

_SQUARE = "/square"


@dataclass
class _Step:
    number: int = 1


@dataclass(frozen=True)
class MixtureCE(TokenCE):
    """The objective ``mixture_ce``.

    Metrics, means over the supervised tokens of the global batch: ``loss/ce`` in nats; ``loss/total``, in training less
    the entropy by its coefficient, in validation the same as ``loss/ce``; ``routing/<expert>``, the weight of each;
    ``routing/entropy`` in nats. ``routing/<expert>/std``, the weight's standard deviation over these tokens;
    ``routing/entropy_coeff``; ``tokens/supervised``, a count.

    Attributes:
        coefficient: of the entropy at the first step.
        steps: of the run.
    """

    coefficient: float
    steps: int
    _step: _Step

    @classmethod
    def from_config(cls, cfg: RunConfig) -> Self:
        """With ``training.mixture_entropy_coeff``."""
        return cls(cfg.training.mixture_entropy_coeff, cfg.training.train_iters, _Step())

    def begin_step(self, step: int) -> None:
        """The coefficient is that of this step."""
        self._step.number = step

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """See ``Objective``; ``totals`` holds ``tokens/supervised``."""
        result = super().__call__(output, batch, totals)
        share = 1.0 / max(totals["tokens/supervised"], 1.0)
        weight_NE = at_places(cast(Tensor, output.expert_weight_BSE), batch.supervised)
        spread = entropy(weight_NE).sum() * share
        names = cast(Any, output.model.decoder).experts.keys()
        wide_NE = weight_NE.detach().double()  # a deviation is what two sums leave of each other
        metrics = {}
        for ending, of_each in (("", wide_NE), (_SQUARE, wide_NE.square())):
            means = (of_each.sum(0) * share).unbind()
            metrics |= {f"routing/{name}{ending}": mean for name, mean in zip(names, means, strict=True)}
        metrics |= {"loss/ce": result.loss.detach(), "routing/entropy": spread.detach()}
        loss = result.loss - self._current() * spread if output.model.training else result.loss
        return ObjectiveResult(loss, {"loss/total": loss.detach(), **metrics})

    def of_sums(self, sums: dict[str, float]) -> dict[str, float]:
        """Of the mean of a weight's square its standard deviation."""
        squares = {tag.removesuffix(_SQUARE): value for tag, value in sums.items() if tag.endswith(_SQUARE)}
        stds = {f"{tag}/std": math.sqrt(max(square - sums[tag] ** 2, 0.0)) for tag, square in squares.items()}
        return {tag: value for tag, value in sums.items() if not tag.endswith(_SQUARE)} | stds

    def summary(self, totals: dict[str, float]) -> dict[str, float]:
        """The count, and the coefficient of the step."""
        return {**totals, "routing/entropy_coeff": self._current()}

    def _current(self) -> float:
        return self.coefficient * (1 - (self._step.number - 1) / max(self.steps - 1, 1))
