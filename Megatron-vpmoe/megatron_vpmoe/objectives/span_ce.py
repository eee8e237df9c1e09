"""Span-normalised cross-entropy: L = w_r * mean(CE | analysis) + w_f * mean(CE | final).

The reasoning of a conversation is many times longer than its answer. Two means, each over its own span's supervised
tokens in the whole global batch, keep the answer from being drowned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_vpmoe.data.batch import Batch, Span
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.model.output.terms import at_places
from megatron_vpmoe.objectives.interface import Objective, ObjectiveResult

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.model.output import ModelOutput

_SPANS = {"analysis": Span.ANALYSIS, "final": Span.FINAL}


def means_by_span(
    name: str, values_N: Tensor, batch: Batch, totals: dict[str, float], counts: str = "tokens"
) -> dict[str, Tensor]:
    """``<name>/{analysis,final}``: a micro-batch's part of the mean over each span's tokens of the global batch.

    Args:
        values_N: of the supervised positions, in row-major order.
        totals: holds ``<counts>/{analysis,final}``, what the sums are divided by.
    """
    spans = at_places(batch.span_id, batch.supervised)
    return {
        f"{name}/{of}": torch.where(spans == span, values_N, 0).sum() / max(totals[f"{counts}/{of}"], 1.0)
        for of, span in _SPANS.items()
    }


@dataclass(frozen=True)
class SpanCE(Objective):
    """The objective ``span_ce``.

    Metrics: ``loss/total``, and per span ``loss/{analysis,final}`` (mean CE in nats), ``tokens/{analysis,final}``
    (supervised tokens of the global batch) and ``weight/{analysis,final}`` (the weight that took effect).

    A span without a supervised token in the global batch contributes 0 to the loss, and its effective weight is
    reported as 0.

    Attributes:
        weight_analysis: w_r, ``kd_span_weight_reasoning``.
        weight_final: w_f, ``kd_span_weight_final``.
    """

    weight_analysis: float
    weight_final: float

    @classmethod
    def from_config(cls, cfg: RunConfig) -> SpanCE:
        """With the weights of ``training.kd_span_weight_{reasoning,final}``."""
        return cls(cfg.training.kd_span_weight_reasoning, cfg.training.kd_span_weight_final)

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """Supervised tokens of each span in this rank's share of the global batch.

        Raises:
            DataError: a supervised token belongs to neither span, so it would be trained on by no term.
        """
        for batch in batches:
            if stray := batch.span_count(Span.CONTEXT):
                raise DataError(
                    f"{stray} supervised tokens in span 0 (context), which no term trains on",
                    source=f"samples {batch.sample_ids}",
                    remedy="rebuild the dataset, or train plain text with an objective for plain text",
                )
        return {f"tokens/{name}": sum(batch.span_count(span) for batch in batches) for name, span in _SPANS.items()}

    def weight_of_each(self, batch: Batch, totals: dict[str, float]) -> Tensor:
        """Of each position in the loss: its span's weight over the span's supervised tokens, fp32 [b, s]."""
        of_span = torch.zeros(len(Span), device=batch.labels.device)
        for span, weight in ((Span.ANALYSIS, self.weight_analysis), (Span.FINAL, self.weight_final)):
            of_span[span] = weight / max(totals[f"tokens/{span.name.lower()}"], 1.0)
        return of_span[batch.span_id.long()]

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """See ``Objective``; ``totals`` holds ``tokens/analysis`` and ``tokens/final``."""
        # The sum over no tokens is a zero that hangs on the graph: a micro-batch without supervised tokens still has a
        # gradient (of zero), and its rank takes part in the gradient exchange.
        loss, losses = output.cross_entropy(batch.labels, batch.supervised, self.weight_of_each(batch, totals))
        metrics = means_by_span("loss", losses, batch, totals)
        return ObjectiveResult(loss, {"loss/total": loss.detach(), **metrics})

    def summary(self, totals: dict[str, float]) -> dict[str, float]:
        """``tokens/*`` and ``weight/*`` of the global batch."""
        analysis, final = totals["tokens/analysis"], totals["tokens/final"]
        return {
            "tokens/analysis": analysis,
            "tokens/final": final,
            "weight/analysis": self.weight_analysis if analysis else 0.0,
            "weight/final": self.weight_final if final else 0.0,
        }
