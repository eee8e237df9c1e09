"""Plain cross-entropy: L = mean(CE) over all supervised tokens of the global batch, whatever span they belong to.

For text without spans (healing) and for mixes of it with conversations, where each supervised token weighs the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.objectives.interface import Objective, ObjectiveResult

if TYPE_CHECKING:
    from megatron_vpmoe.model.output import ModelOutput


@dataclass(frozen=True)
class TokenCE(Objective):
    """The objective ``token_ce``.

    Metrics: ``loss/total`` (mean CE in nats) and ``tokens/supervised`` (supervised tokens of the global batch).
    A global batch without a supervised token has a loss of 0.
    """

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """Supervised tokens in this rank's share of the global batch."""
        return {"tokens/supervised": sum(int(batch.loss_mask.sum()) for batch in batches)}

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """See ``Objective``; ``totals`` holds ``tokens/supervised``."""
        # The sum over no tokens is a zero that hangs on the graph, so every rank takes part in the gradient exchange.
        share = 1.0 / max(totals["tokens/supervised"], 1.0)
        weight = torch.full(batch.labels.shape, share, device=batch.labels.device)
        loss, _ = output.cross_entropy(batch.labels, batch.supervised, weight)
        return ObjectiveResult(loss, {"loss/total": loss.detach()})
