"""Denoising: the squared error of a denoiser's estimate of the next token's standardised embedding.

L = mean over supervised tokens of the error at a level of each one's own. Levels and noise are a hash of seed, sample,
document and position: a resumed run draws what it would have drawn, and validation draws the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.objectives.interface import Objective, ObjectiveResult
from megatron_vpmoe.runtime.counter import draw_key, random_bits

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.model.output import ModelOutput

_TRAINING, _VALIDATION = 0, 1


@dataclass(frozen=True)
class Denoising(Objective):
    """The objective ``denoising``.

    Metrics: ``loss/total`` (mean squared error a channel, 1 where nothing is known) and ``tokens/supervised``. In
    validation also ``denoised/error``, that of what DDIM finds from pure noise. A global batch without a supervised
    token has a loss of 0.

    Attributes:
        seed: of levels and noise.
    """

    seed: int = 0

    @classmethod
    def from_config(cls, cfg: RunConfig) -> Self:
        """With the run's seed."""
        return cls(cfg.training.seed)

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """Supervised tokens in this rank's share of the global batch."""
        return {"tokens/supervised": sum(int(batch.loss_mask.sum()) for batch in batches)}

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """See ``Objective``; ``totals`` holds ``tokens/supervised``."""
        share = 1.0 / max(totals["tokens/supervised"], 1.0)
        denoiser = cast(Any, output.model.decoder)
        layout = SequenceLayout(batch.document_id, batch.position_ids, recurs=True)
        target_BSH, key_BS = output.model.standardised(batch.labels), self.noise_keys(batch, denoiser.training)
        error_BS = denoiser.loss(output.hidden_BSH, target_BSH, layout, key_BS)
        loss = (error_BS * batch.loss_mask).sum() * share
        metrics = {"loss/total": loss.detach()}
        if not denoiser.training:
            found_BSH = denoiser(output.hidden_BSH, layout, noise_key_BS=key_BS)
            error_BS = (found_BSH.float() - target_BSH.float()).square().mean(-1)
            metrics["denoised/error"] = (error_BS * batch.loss_mask).sum() * share
        return ObjectiveResult(loss, metrics)

    def noise_keys(self, batch: Batch, training: bool) -> Tensor:
        """int64 [b, s]: of each position a hash of seed, pass, sample, document and position."""

        def filled(number: int) -> Tensor:
            """By the device, which a copy of the host's number would wait for."""
            return torch.full((), number, dtype=torch.int64, device=batch.tokens.device)

        run = filled(draw_key(self.seed, _TRAINING if training else _VALIDATION))
        row_B = random_bits(run, torch.stack([*map(filled, batch.sample_ids)]))
        document_BS = random_bits(row_B.unsqueeze(1), batch.document_id.long())
        return random_bits(document_BS, batch.position_ids)
