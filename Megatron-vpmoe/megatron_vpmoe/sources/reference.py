"""Log-probabilities of a frozen model, as an annotation: what DPO and KL penalties hold the trained model against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vpmoe.annotation import REFERENCE_LOG_P
from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel


class Reference:
    """Annotates batches with ``reference_log_p``: log p(label) under a frozen model where the loss mask holds, else 0.

    The model is given later than what is declared, so that needs are checked before any weight is allocated.

    Args:
        temperature: that its logits are divided by.

    Attributes:
        check: called before each forward pass; may raise.
    """

    annotations = (REFERENCE_LOG_P,)

    def __init__(self, temperature: float = 1.0) -> None:
        self._model: VPModel | None = None
        self._temperature = temperature
        self.check: Callable[[], None] = lambda: None

    def open(self, model: VPModel) -> None:
        """Take a model, frozen from here on and never in training mode."""
        self._model = model.requires_grad_(False).eval()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """See ``Annotator``; a collective where the model is spread over ranks."""
        if self._model is None:
            raise RuntimeError("the reference has no model yet: open() it before the first batch")
        self.check()
        return {REFERENCE_LOG_P.name: log_p_of_labels(self._model, batch, self._temperature)}


@torch.no_grad()
def log_p_of_labels(model: VPModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Fp32 [b, s] on the CPU: log p(label) at a temperature where the loss mask holds, else 0.

    A collective where the model is spread over ranks.

    Args:
        model: in evaluation mode.
        batch: on the CPU.
        temperature: that the logits are divided by.
    """
    here = batch.to(model.device)
    layout = SequenceLayout(document_id=here.document_id, position=here.position_ids, recurs=True)
    output = model(here.tokens, layout)
    log_p, _ = output.log_probabilities(here.labels, here.loss_mask, temperature=temperature)
    values = torch.zeros(here.labels.shape, device=here.labels.device)
    values[here.loss_mask] = log_p.float()
    return values.cpu()
