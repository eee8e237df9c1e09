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

    Attributes:
        check: called before each forward pass; may raise.
    """

    annotations = (REFERENCE_LOG_P,)

    def __init__(self) -> None:
        self._model: VPModel | None = None
        self.check: Callable[[], None] = lambda: None

    def open(self, model: VPModel) -> None:
        """Take a model, frozen from here on and never in training mode."""
        self._model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """See ``Annotator``; a collective where the model is spread over ranks."""
        if self._model is None:
            raise RuntimeError("the reference has no model yet: open() it before the first batch")
        self.check()
        here = batch.to(self._model.device)
        layout = SequenceLayout(document_id=here.document_id, position=here.position_ids, recurs=True)
        output = self._model(here.tokens, layout)
        log_p, _ = output.log_probabilities(here.labels, here.loss_mask)
        values = torch.zeros(here.labels.shape, device=here.labels.device)
        values[here.loss_mask] = log_p.float()
        return {REFERENCE_LOG_P.name: values.cpu()}
