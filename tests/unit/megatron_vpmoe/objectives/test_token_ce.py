"""token_ce: the mean over supervised tokens, whatever their span and however the global batch is split."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from plain_output import VOCAB, logits_for, logits_output
from torch import Tensor

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.objectives import TokenCE, build_objective
from tests.tiny import random_batch, rows_of, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


def plain_text_batch(rows: int, seed: int) -> Batch:
    """Every label of a document supervised, no spans."""
    batch = random_batch(rows, 32, VOCAB, seed)
    document = batch.document_id
    batch.loss_mask[:, :-1] = (document[:, :-1] >= 0) & (document[:, :-1] == document[:, 1:])
    batch.loss_mask[:, -1] = False
    batch.span_id.zero_()
    return batch


def by_definition(logits_BSV: Tensor, batch: Batch) -> Tensor:
    log_probs = logits_BSV.float().log_softmax(-1)
    places = batch.loss_mask.nonzero().tolist()
    return -sum(log_probs[row, column, batch.labels[row, column]] for row, column in places) / len(places)  # pyright: ignore


@pytest.mark.parametrize("batch", [plain_text_batch(6, 0), random_batch(6, 32, VOCAB, 1)], ids=["text", "spans"])
@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_any_split_sums_to_the_mean_over_supervised_tokens(batch: Batch, cuts: list[int]):
    objective, logits = TokenCE(), logits_for(batch)
    expected = by_definition(logits, batch)
    parts = [rows_of(batch, begin, end) for begin, end in pairwise(cuts)]
    totals = {key: float(value) for key, value in objective.counts(parts).items()}
    assert totals == {"tokens/supervised": int(batch.loss_mask.sum())} == objective.summary(totals)
    results = [
        objective(logits_output(logits[begin:end]), part, totals)
        for part, (begin, end) in zip(parts, pairwise(cuts), strict=True)
    ]
    loss = torch.stack([result.loss for result in results]).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])
    assert sum(float(result.metrics["loss/total"]) for result in results) == pytest.approx(float(expected), rel=1e-5)
    assert not results[0].metrics["loss/total"].requires_grad


def test_a_batch_of_padding_has_a_zero_loss_with_a_gradient():
    batch = plain_text_batch(2, 5)
    batch.loss_mask.zero_()
    logits = logits_for(batch)
    result = TokenCE()(logits_output(logits), batch, {"tokens/supervised": 0.0})
    result.loss.backward()
    assert float(result.loss) == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_built_from_the_configuration():
    assert build_objective(tiny_config(objective="token_ce")) == TokenCE()
