"""What a frozen second model says of each batch, as annotations: a reference's log p of labels, a teacher's top K."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_vpmoe.annotation import (
    NO_RECORD,
    REFERENCE_LOG_P,
    TEACHER_IDS,
    TEACHER_LABEL_LOG_P,
    Annotation,
    of_teacher,
)
from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.output import ModelOutput
from megatron_vpmoe.runtime.signals import StopRequest


class FrozenModel(ABC):
    """Annotates batches where the loss mask holds.

    The model is given later than what is declared, so that needs are checked before any weight is allocated.
    """

    name: str
    annotations: tuple[Annotation, ...]

    def __init__(self) -> None:
        self._model: VPModel | None = None
        self._check: Callable[[], None] = lambda: None

    def open(self, model: VPModel) -> None:
        """Take a model, frozen from here on and never in training mode."""
        self._model = model.requires_grad_(False).eval()

    def heed(self, stop: StopRequest) -> None:
        """See ``Annotator``; it is asked before each forward pass."""
        self._check = stop.check()

    def close(self) -> None:  # noqa: B027
        """See ``Annotator``."""

    def __call__(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """See ``Annotator``; a collective where the model is spread over ranks."""
        if self._model is None:
            raise RuntimeError(f"the {self.name} has no model yet: open() it before the first batch")
        found = []
        for batch in batches:
            self._check()
            found.append(self._of(self._model, batch))
        return found

    @abstractmethod
    def _of(self, model: VPModel, batch: Batch) -> dict[str, Tensor]: ...


class Reference(FrozenModel):
    """Annotates with ``reference_log_p``: log p(label) where the loss mask holds, else 0.

    Args:
        temperature: that its logits are divided by.
    """

    name = "reference"
    annotations = (REFERENCE_LOG_P,)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.annotations, self._temperature = (REFERENCE_LOG_P.at(temperature),), temperature

    def _of(self, model: VPModel, batch: Batch) -> dict[str, Tensor]:
        return {REFERENCE_LOG_P.name: log_p_of_labels(model, batch, self._temperature)}


class Teacher(FrozenModel):
    """Annotates with what ``teacher_ids`` and its companions declare; NO_RECORD where the loss mask does not hold.

    Args:
        top_k: ids a token; 0: only the log-probability of the label is asked for.
        temperature: that its logits are divided by.
        vocab_size: of the ids that mean something, which alone are named; None: all that it has.
    """

    name = "teacher"

    def __init__(self, top_k: int, temperature: float = 1.0, vocab_size: int | None = None) -> None:
        super().__init__()
        self._top_k, self._temperature = top_k, temperature
        self._among = None if vocab_size is None else torch.arange(vocab_size)
        self.annotations = asked_of_teacher(top_k, temperature)

    @torch.no_grad()
    def _of(self, model: VPModel, batch: Batch) -> dict[str, Tensor]:
        if not self._top_k:
            return {TEACHER_LABEL_LOG_P.name: log_p_of_labels(model, batch, self._temperature)}
        output, here = _output(model, batch)
        among = None if self._among is None else self._among.to(model.device)
        how = {"temperature": self._temperature, "among": among}
        found = output.likeliest(here.labels, here.supervised, self._top_k, **how)
        return laid_over(here.loss_mask, self.annotations, found)


def asked_of_teacher(top_k: int, temperature: float) -> tuple[Annotation, ...]:
    """What a teacher says of a position: its ``top_k`` likeliest ids and the label, or for 0 the label alone."""
    return of_teacher(top_k, temperature) if top_k else (TEACHER_LABEL_LOG_P.at(temperature),)


def laid_over(mask: Tensor, annotations: Sequence[Annotation], found: Sequence[Tensor]) -> dict[str, Tensor]:
    """Annotations of a batch by name, on the CPU: ``found`` where the mask holds, elsewhere what says of no record.

    Args:
        mask: bool [b, s].
        annotations: of ``asked_of_teacher``.
        found: of each annotation the values, [n] or [n, K], in the order of the mask's positions.
    """
    places = {}
    for declared, values in zip(annotations, found, strict=True):
        fill, dtype = NO_RECORD if declared.name == TEACHER_IDS.name else 0, getattr(torch, declared.dtype)
        whole = torch.full((*mask.shape, *values.shape[1:]), fill, dtype=dtype, device=values.device)
        whole[mask] = values.to(dtype)
        places[declared.name] = whole.cpu()
    return places


@torch.no_grad()
def log_p_of_labels(model: VPModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Fp32 [b, s] on the CPU: log p(label) at a temperature where the loss mask holds, else 0.

    A collective where the model is spread over ranks.

    Args:
        model: in evaluation mode.
        batch: on the CPU.
        temperature: that the logits are divided by.
    """
    output, here = _output(model, batch)
    log_p, _ = output.log_probabilities(here.labels, here.supervised, temperature=temperature)
    values = torch.zeros(here.labels.shape, device=here.labels.device)
    values[here.loss_mask] = log_p.float()
    return values.cpu()


def _output(model: VPModel, batch: Batch) -> tuple[ModelOutput, Batch]:
    """A forward pass, and the batch on the model's device; whoever reads the output does so without gradients."""
    here = batch.to(model.device)
    layout = SequenceLayout(document_id=here.document_id, position=here.position_ids, recurs=True)
    output = model(here.tokens, layout)
    assert isinstance(output, ModelOutput), "a frozen model is not cut into stages"
    return output, here
