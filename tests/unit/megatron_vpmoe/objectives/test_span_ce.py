"""span_ce: the formula, its gradient, and that neither depends on how the global batch is split."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from plain_output import VOCAB, logits_for, logits_output, waits_of
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.objectives import SpanCE, build_objective
from tests.tiny import random_batch, rows_of, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


def totals_of(objective: SpanCE, batches: list[Batch]) -> dict[str, float]:
    return {key: float(value) for key, value in objective.counts(batches).items()}


def by_definition(logits_BSV: Tensor, batch: Batch, weights: tuple[float, float]) -> Tensor:
    """The loss token by token."""
    log_probs = logits_BSV.float().log_softmax(-1)
    sums, counts = [torch.zeros(()), torch.zeros(())], [0, 0]
    for row in range(batch.tokens.shape[0]):
        for column in range(batch.tokens.shape[1]):
            span = int(batch.span_id[row, column])
            if batch.loss_mask[row, column] and span:
                sums[span - 1] = sums[span - 1] - log_probs[row, column, batch.labels[row, column]]
                counts[span - 1] += 1
    return sum(w * s / n for w, s, n in zip(weights, sums, counts, strict=True))  # pyright: ignore


def test_equals_the_definition_in_value_and_gradient():
    batch, objective = random_batch(3, 32, VOCAB, seed=0), SpanCE(0.7, 1.9)
    logits = logits_for(batch)
    result = objective(logits_output(logits), batch, totals_of(objective, [batch]))
    expected = by_definition(logits, batch, (0.7, 1.9))
    torch.testing.assert_close(result.loss, expected)
    (got,), (wanted,) = torch.autograd.grad(result.loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, wanted)
    assert not result.metrics["loss/total"].requires_grad
    weighted = 0.7 * result.metrics["loss/analysis"] + 1.9 * result.metrics["loss/final"]
    torch.testing.assert_close(result.metrics["loss/total"], weighted)


@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 6], [0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_any_split_sums_to_the_same_loss_and_gradient(cuts):
    whole, objective = random_batch(6, 32, VOCAB, seed=2), SpanCE(1.0, 1.0)
    logits = logits_for(whole)
    expected = by_definition(logits, whole, (1.0, 1.0))
    (wanted,) = torch.autograd.grad(expected, logits)

    parts = [rows_of(whole, begin, end) for begin, end in pairwise(cuts)]
    totals = totals_of(objective, parts)
    loss, metrics = torch.zeros(()), {"loss/total": 0.0, "loss/analysis": 0.0, "loss/final": 0.0}
    for part, begin, end in zip(parts, cuts, cuts[1:], strict=False):
        result = objective(logits_output(logits[begin:end]), part, totals)
        loss = loss + result.loss
        metrics = {tag: metrics[tag] + float(result.metrics[tag]) for tag in metrics}
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)
    assert metrics["loss/total"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_long_span_does_not_drown_a_short_one():
    batch, objective = random_batch(2, 40, VOCAB, seed=3), SpanCE(1.0, 1.0)
    supervised = batch.loss_mask.nonzero()
    batch.span_id[batch.loss_mask] = 1
    for row, column in supervised[:2].tolist():
        batch.span_id[row, column] = 2
    logits = logits_for(batch)
    result = objective(logits_output(logits), batch, totals_of(objective, [batch]))
    (gradient,) = torch.autograd.grad(result.loss, logits)
    # Per span the probabilities' gradients at the labels weigh 1 / n: here 1/2 against 1/many.
    expected = (logits.float().softmax(-1) - functional.one_hot(batch.labels, VOCAB)).double()
    final = batch.span_id == 2
    torch.testing.assert_close(gradient[final], expected[final] / 2, check_dtype=False)


def test_an_absent_span_contributes_nothing_and_is_reported():
    batch, objective = random_batch(2, 32, VOCAB, seed=4), SpanCE(1.0, 2.0)
    batch.loss_mask[batch.span_id == 2] = False
    totals = totals_of(objective, [batch])
    result = objective(logits_output(logits_for(batch)), batch, totals)
    assert result.loss.isfinite() and result.loss.item() == pytest.approx(float(result.metrics["loss/analysis"]))
    assert float(result.metrics["loss/final"]) == 0.0
    summary = objective.summary(totals)
    assert summary["tokens/final"] == 0 and summary["weight/final"] == 0.0
    assert summary["tokens/analysis"] == int(batch.loss_mask.sum()) and summary["weight/analysis"] == 1.0


def test_a_batch_of_padding_has_a_zero_loss_with_a_gradient():
    batch, objective = random_batch(2, 32, VOCAB, seed=5), SpanCE(1.0, 1.0)
    batch.loss_mask.zero_()
    logits = logits_for(batch)
    result = objective(logits_output(logits), batch, {"tokens/analysis": 100.0, "tokens/final": 50.0})
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_supervised_context_is_refused():
    batch = random_batch(2, 32, VOCAB, seed=6)
    batch.span_id[batch.loss_mask] = 0
    with pytest.raises(DataError, match="span 0"):
        SpanCE(1.0, 1.0).counts([batch])


def test_built_from_the_configuration():
    objective = build_objective(tiny_config(kd_span_weight_reasoning=0.25, kd_span_weight_final=3.0))
    assert objective == SpanCE(0.25, 3.0)


def test_a_gpu_is_not_waited_for() -> None:
    assert waits_of(SpanCE(0.7, 1.9), random_batch(2, 32, VOCAB, seed=0)) == []
