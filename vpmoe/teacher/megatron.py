"""A teacher of ours: a run, a checkpoint, an object of a ladder, or an HF directory that ``open_model`` knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vpmoe.data.batch import Document, assemble
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.output import likeliest
from megatron_vpmoe.sources.annotated import in_rows
from vpmoe.eval.open_model import Opened, open_model
from vpmoe.teacher.interface import Answer, Conversation, Question, batches
from vpmoe.tokenizer import Tokenizer
from vpmoe.weights.geometry import geometry_of


class MegatronTeacher:
    """See ``Teacher``. Conversations share rows, as in training.

    Args:
        path: as :func:`vpmoe.eval.open_model.open_model` takes it.
        bf16: compute in it or not; None: as its run did, and other models in fp32.
        tokens: of a batch.

    Raises:
        CheckpointError, WeightsError, TokenizerError: no model there.
    """

    def __init__(self, path: Path, *, bf16: bool | None, tokens: int) -> None:
        self._path, self._bf16, self._tokens = path, bf16, tokens
        with open_model(path, bf16=bf16) as found:
            entry = found.entry
            self.tokenizer: Tokenizer | None = found.tokenizer
            self.identity: dict[str, Any] = {
                "by": "megatron",
                "weights_sha256": entry.pop("weights_sha256"),
                "geometry": geometry_of(found.cfg),
                "bf16": found.cfg.training.bf16,
                "batch_tokens": tokens,
                "row_tokens": found.cfg.data.seq_length,
            }
            self.told = entry

    def batches(self, conversations: Iterable[Conversation]) -> Iterator[Sequence[Conversation]]:
        """What is scored together."""
        return batches(conversations, self._tokens)

    @contextmanager
    def open(self, question: Question, student: Tokenizer | None) -> Iterator[_Scorer]:
        """See ``Teacher``."""
        with open_model(self._path, bf16=self._bf16) as found:
            yield _Scorer(found, question, self)


class _Scorer:
    def __init__(self, found: Opened, question: Question, teacher: MegatronTeacher) -> None:
        self._model, self._eod_id = found.model, found.tokenizer.eod_id
        self._row = found.cfg.data.seq_length
        self._question, self._teacher = question, teacher

    def score(self, conversations: Iterable[Conversation]) -> Iterator[list[Answer]]:
        """See ``Scorer``."""
        for batch in self._teacher.batches(conversations):
            yield self._answers(batch)

    @torch.no_grad()
    def _answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        documents = []
        for tokens, positions, _ in conversations:
            mask = np.zeros(len(tokens), np.uint8)
            mask[positions] = 1
            documents.append(Document(tokens.astype(np.int32), mask, np.zeros_like(mask)))
        # Not all in one row: without a kernel for packed rows, attention's cost is its length's square.
        length = max(self._row, *(len(document.tokens) for document in documents))
        [rows] = in_rows(documents, length, len(documents))
        batch = assemble(rows, seq_length=length, eod_id=self._eod_id, sample_ids=range(len(rows)))
        batch = batch.to(self._model.device)
        layout = SequenceLayout(document_id=batch.document_id, position=batch.position_ids)
        output = self._model(batch.tokens, layout)
        return answers(output.hidden_BSH[batch.loss_mask], output.model.output_weight(), self._question, conversations)


def answers(
    hidden_NH: Tensor, projection_VH: Tensor, question: Question, conversations: Sequence[Conversation]
) -> list[Answer]:
    """What a model says of the positions of some conversations, whose last hidden states are given."""
    labels = torch.from_numpy(np.concatenate([each.labels for each in conversations])).to(hidden_NH.device)
    asked = hidden_NH, projection_VH, labels, question.count
    among = torch.from_numpy(question.among).to(hidden_NH.device)
    ids, log_p, of_label = likeliest(*asked, temperature=question.temperature, among=among)
    lost = torch.zeros_like(of_label)
    if len(among) < len(projection_VH):
        own, own_log_p, _ = likeliest(*asked, temperature=question.temperature)
        lost = torch.where(torch.isin(own, among), 0.0, own_log_p.exp()).sum(-1)
    arrays = (ids.to(torch.int32), log_p.float(), of_label.float(), lost.float())
    ends = np.cumsum([len(each.positions) for each in conversations])[:-1]
    split = zip(*(np.split(array.cpu().numpy(), ends) for array in arrays), strict=True)
    return [Answer((ids, log_p, of_label), lost) for ids, log_p, of_label, lost in split]
