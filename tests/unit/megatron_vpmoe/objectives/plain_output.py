"""A model output that is nothing but logits, for the objectives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.data.batch import Batch

VOCAB = 17


class Logits:
    """A model output that is nothing but logits [B, S, V]."""

    def __init__(self, logits_BSV: Tensor) -> None:
        self.logits_BSV = logits_BSV

    def cross_entropy(self, labels_BS: Tensor, mask_BS: Tensor, weight_BS: Tensor) -> tuple[Tensor, Tensor]:
        losses = functional.cross_entropy(self.logits_BSV[mask_BS].float(), labels_BS[mask_BS], reduction="none")
        return (losses * weight_BS[mask_BS]).sum(), losses.detach()


def logits_for(batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*batch.tokens.shape, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
