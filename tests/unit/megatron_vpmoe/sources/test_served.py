"""A served teacher's answers lie where their tokens are; what nobody learns from is not asked."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vpmoe.annotation import NO_RECORD
from megatron_vpmoe.sources import Passage, Served
from megatron_vpmoe.teacher_records import Records
from tests.tiny import random_batch


class LastFirst:
    """Says of a position what the token and the label are; what it was asked last it answers first, a moment later."""

    def __init__(self, top_k: int) -> None:
        self._top_k, self.passages = top_k, list[Passage]()

    def ask(self, passage: Passage) -> Future[Records]:
        self.passages.append(passage)
        future: Future[Records] = Future()
        threading.Timer(0.3 / len(self.passages), lambda: future.set_result(self.said_of(passage))).start()
        return future

    def said_of(self, passage: Passage) -> Records:
        ids = np.repeat(passage.tokens[passage.positions][:, None], self._top_k, 1) + np.arange(self._top_k)
        return ids.astype(np.int32), -ids.astype(np.float32), -passage.labels.astype(np.float32)

    def close(self) -> None: ...


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("top_k", [3, 0])
def test_what_is_said_lies_where_it_belongs(top_k: int) -> None:
    batches = [random_batch(2, 24, 60, seed) for seed in range(3)]
    is_sampled = torch.tensor([[1, 0, 1], [0, 1, 1]])
    batches[1] = replace(batches[1], annotations={"is_sampled": is_sampled})
    batches[2].loss_mask[:] = False
    server = LastFirst(top_k)
    found = Served(server, top_k)(batches)
    asked = [batch.loss_mask.clone() for batch in batches]
    asked[1] &= batches[1].per_token("is_sampled").bool()
    documents = 0
    for batch, mask, said in zip(batches, asked, found, strict=True):
        assert list(said) == (["teacher_ids", "teacher_log_p"] if top_k else []) + ["teacher_label_log_p"]
        assert torch.equal(said["teacher_label_log_p"], torch.where(mask, -batch.labels, 0).float())
        if top_k:
            ids = torch.where(mask[..., None], batch.tokens[..., None] + torch.arange(top_k), NO_RECORD)
            assert torch.equal(said["teacher_ids"], ids.int()) and said["teacher_ids"].dtype == torch.int32
            assert torch.equal(said["teacher_log_p"], torch.where(mask[..., None], -ids, 0).float())
        documents += sum(len(set(own[where].tolist())) for own, where in zip(batch.document_id, mask, strict=True))
    assert len(server.passages) == documents
    for passage in server.passages:  # whole documents and nothing of their neighbours
        assert any(
            torch.equal(batch.tokens[row][batch.document_id[row] == number], torch.from_numpy(passage.tokens))
            for batch in batches
            for row in range(2)
            for number in range(3)
        )
