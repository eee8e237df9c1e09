"""The one batch type: rows of whole conversations, with everything that attention and an objective ask of them.

Shapes: b rows of a micro-batch, s positions of a row (``seq_length``), L tokens of a conversation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vpmoe.annotation import IS_SAMPLED, Annotation
from megatron_vpmoe.data.annotations import laid_out
from megatron_vpmoe.errors import DataError

PADDING = -1
"""``document_id`` of a position that holds no conversation; also the sample id of a row that exists only as filler."""


class Span(IntEnum):
    """What a label belongs to."""

    CONTEXT = 0
    ANALYSIS = 1
    FINAL = 2


@dataclass(frozen=True)
class Document:
    """One conversation as stored.

    Attributes:
        tokens: int32 [L].
        loss_mask: uint8 [L]; entry t says whether token t+1 is supervised, the last entry is 0.
        span_id: uint8 [L]; entry t is the span of token t+1, the last entry is 0.
        ends: ids of what closes a message and of what ends a turn; None where the vocabulary has no messages.
        annotations: arrays by name, as their ``Annotation`` says.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    span_id: NDArray[np.uint8]
    ends: tuple[int, int] | None = None
    annotations: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32 [L - 1]; the next tokens, but for what ends a turn wherever a final message is closed."""
        labels = self.tokens[1:]
        if self.ends is None:
            return labels
        message_end, turn_end = self.ends
        closed = (labels == message_end) & (self.span_id[:-1] == Span.FINAL)
        return np.where(closed, np.int32(turn_end), labels)

    @property
    def prompt(self) -> NDArray[np.int32]:
        """The tokens before the first one of an assistant span; all of them where there is no such span."""
        assistant = np.flatnonzero(self.span_id)
        return self.tokens[: assistant[0] + 1] if assistant.size else self.tokens


@dataclass(frozen=True)
class Batch:
    """One micro-batch. A conversation of L tokens takes L consecutive positions of one row.

    Attributes:
        tokens: int64 [b, s]; padding holds the end-of-document token.
        labels: int64 [b, s]; the next token of the same conversation (``Document.labels``), the end-of-document token
            after its last one.
        position_ids: int64 [b, s]; restarts at 0 with each conversation, 0 in padding.
        document_id: int32 [b, s]; 0, 1, 2, ... in the order of the row, -1 in padding.
        loss_mask: bool [b, s]; True where the label is supervised.
        span_id: uint8 [b, s]; the label's span (``Span``), 0 in padding.
        sample_ids: place of each row in the global order, -1 for a row that only fills up the batch.
        annotations: by name, [b, s], [b, s, K] or one a document [b, d], as their ``Annotation`` says; 0 in padding.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    document_id: Tensor
    loss_mask: Tensor
    span_id: Tensor
    sample_ids: list[int]
    annotations: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; the copies of a pinned one are only queued there."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, which a GPU copies from while this process goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        core = {one.name: change(value) for one in fields(self) if isinstance(value := getattr(self, one.name), Tensor)}
        changed = replace(self, **core, annotations={name: change(value) for name, value in self.annotations.items()})
        asked = ("supervised", *(("sampled", "anchor") if IS_SAMPLED.name in self.annotations else ()))
        vars(changed).update({name: change(getattr(self, name)) for name in asked}, documents=self.documents)
        return changed

    @functools.cached_property
    def supervised(self) -> Tensor:
        """int64 [n]: where ``loss_mask`` holds, row-major. Of the host's batch it goes along to a device, which would
        have to be waited for.
        """
        return _places(self.loss_mask)

    @functools.cached_property
    def sampled(self) -> Tensor:
        """int64 [m]: those of ``supervised`` that a model has sampled (``IS_SAMPLED``); goes along as they do."""
        return _places(self.loss_mask & self.per_token(IS_SAMPLED.name).bool())

    @functools.cached_property
    def anchor(self) -> Tensor:
        """int64 [n - m]: the others."""
        return _places(self.loss_mask & ~self.per_token(IS_SAMPLED.name).bool())

    @functools.cached_property
    def documents(self) -> int:
        """The most that a row holds; goes along as ``supervised`` does."""
        return int(self.document_id.max()) + 1

    def per_token(self, name: str) -> Tensor:
        """An annotation of documents, [b, d], at each of their tokens, [b, s]; that of document 0 in padding."""
        return self.annotations[name].gather(1, self.document_id.clamp(min=0).long())

    @property
    def recorded_id(self) -> Tensor:
        """``document_id``; PADDING also of a stored conversation beside answers, whose routing nothing recorded."""
        if IS_SAMPLED.name not in self.annotations:
            return self.document_id
        return torch.where(self.per_token(IS_SAMPLED.name).bool(), self.document_id, PADDING)

    @property
    def real_tokens(self) -> int:
        """Positions that hold a conversation's token."""
        return int((self.document_id != PADDING).sum())

    def span_count(self, span: int) -> int:
        """Supervised labels of one span."""
        return int((self.loss_mask & (self.span_id == span)).sum())


def _places(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


def assemble(
    rows: Sequence[Sequence[Document]],
    *,
    seq_length: int,
    eod_id: int,
    sample_ids: Sequence[int],
    annotations: Sequence[Annotation] = (),
) -> Batch:
    """Lay conversations out in rows.

    Args:
        rows: the conversations of each row, in order; an empty row becomes padding alone.
        seq_length: positions of a row (s).
        eod_id: the end-of-document token, which fills padding and the label after a conversation's last token.
        sample_ids: one per row.
        annotations: those that every document has and the batch is to carry.

    Raises:
        DataError: the conversations of a row take more than ``seq_length`` positions, or lack a declared annotation.
    """
    shape = (len(rows), seq_length)
    tokens, labels = np.full(shape, eod_id, np.int64), np.full(shape, eod_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    document_id = np.full(shape, PADDING, np.int32)
    loss_mask, span_id = np.zeros(shape, np.bool_), np.zeros(shape, np.uint8)
    for row, documents in enumerate(rows):
        used = sum(len(document.tokens) for document in documents)
        if used > seq_length:
            raise DataError(
                f"{used} tokens do not fit into a row of {seq_length}",
                source=f"sample {sample_ids[row]}",
                remedy="raise seq_length, or build the dataset with a smaller --seq-len",
            )
        start = 0
        for number, document in enumerate(documents):
            end = start + len(document.tokens)
            tokens[row, start:end] = document.tokens
            labels[row, start : end - 1] = document.labels
            position_ids[row, start:end] = np.arange(end - start)
            document_id[row, start:end] = number
            # The last entry describes a token past the conversation: unsupervised whatever the sidecar says.
            loss_mask[row, start : end - 1] = document.loss_mask[:-1]
            span_id[row, start : end - 1] = document.span_id[:-1]
            start = end
    arrays = (tokens, labels, position_ids, document_id, loss_mask, span_id)
    carried = laid_out(annotations, rows, seq_length, sample_ids)
    return Batch(
        *map(torch.from_numpy, arrays),
        sample_ids=list(sample_ids),
        annotations={name: torch.from_numpy(array) for name, array in carried.items()},
    )
