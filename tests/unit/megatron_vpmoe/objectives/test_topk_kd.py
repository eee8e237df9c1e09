"""topk_kd: the formula by fp64 reference in value, gradient and metrics, in any split, with and without records."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from plain_output import VOCAB, logits_for, logits_output, waits_of
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.annotation import NO_RECORD
from megatron_vpmoe.data.batch import Batch, Span
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.objectives import SpanCE, TopKKD, build_objective, check_kinds
from megatron_vpmoe.teacher_records import TeacherRecords
from ref import output as reference
from tests.fixtures_dataset import small_dataset
from tests.tiny import random_batch, rows_of, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

SPANS = {"analysis": Span.ANALYSIS, "final": Span.FINAL}
WEIGHTS = {Span.ANALYSIS: 0.7, Span.FINAL: 1.9}


def scored(rows: int, width: int, temperature: float, seed: int, unscored: float = 0.3) -> tuple[Batch, Tensor]:
    """A batch with records of some positions, and the teacher's logits."""
    batch, generator = random_batch(rows, 32, VOCAB, seed), torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(rows, 32, VOCAB, generator=generator, dtype=torch.float64)
    log_p, ids = (teacher / temperature).log_softmax(-1).topk(width)
    none = (torch.rand(rows, 32, 1, generator=generator) < unscored) | ~batch.loss_mask.unsqueeze(-1)
    ids, log_p = ids.masked_fill(none, NO_RECORD).to(torch.int32), log_p.masked_fill(none, 0)
    return replace(batch, annotations={"teacher_ids": ids, "teacher_log_p": log_p}), teacher


def by_definition(logits: Tensor, batch: Batch, objective: TopKKD) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics, position by position."""
    each: dict[str, list[Tensor]] = {}
    parts: dict[Span, list[Tensor]] = {span: [] for span in WEIGHTS}
    for row, column in batch.loss_mask.nonzero().tolist():
        z, span = logits[row, column], Span(int(batch.span_id[row, column]))
        name = span.name.lower()
        ce = -reference.log_probability(z, int(batch.labels[row, column]))
        each.setdefault(f"loss/{name}", []).append(ce)
        ids = batch.annotations["teacher_ids"][row, column, : objective.top_k].long()
        if ids[0] == NO_RECORD:
            parts[span].append(ce)
            continue
        log_p, tau = batch.annotations["teacher_log_p"][row, column, : objective.top_k], objective.temperature
        kd = reference.divergence(z, ids, log_p, beta=objective.beta, tail=objective.tail, temperature=tau)
        parts[span].append(objective.alpha * kd + (1 - objective.alpha) * ce)
        buckets = torch.cat([log_p.exp(), (1 - log_p.exp().sum()).clamp(min=1e-300).unsqueeze(0)])
        of_record = {
            f"kd/{name}": kd,
            "teacher/captured_mass": log_p.exp().sum(),
            "teacher/entropy": -(buckets * buckets.log()).sum(),
            "teacher/agreement": (z.argmax() == ids[0]).double(),
            "teacher/first_choice_p": (z / tau).softmax(-1)[ids[0]],
        }
        for tag, value in of_record.items():
            each.setdefault(tag, []).append(value)
    loss = sum(WEIGHTS[span] * torch.stack(losses).mean() for span, losses in parts.items())
    assert isinstance(loss, Tensor)
    metrics = {tag: float(torch.stack(values).detach().mean()) for tag, values in each.items()}
    return loss, {"loss/total": float(loss.detach()), **metrics}


@pytest.mark.parametrize("cuts", [[0, 5], [0, 1, 2, 3, 4, 5], [0, 2, 5]])
@pytest.mark.parametrize(
    ("alpha", "beta", "tail", "temperature", "width"),
    [
        (0.6, 0.0, "bucket", 1.0, 5),
        (1.0, 1.0, "bucket", 2.0, 5),
        (0.3, 0.4, "bucket", 0.7, 5),
        (0.5, 0.0, "drop", 2.0, 3),
        (0.5, 1.0, "renormalise", 1.0, 5),
        (0.0, 0.0, "bucket", 1.0, 5),
        (0.9, 0.0, "bucket", 1.5, VOCAB),
    ],
)
def test_equals_the_definition_in_any_split(cuts, alpha, beta, tail, temperature, width) -> None:
    objective = TopKKD(SpanCE(0.7, 1.9), alpha, beta, min(width, 5) if width < VOCAB else width, temperature, tail)
    whole, _ = scored(5, width + (width < VOCAB), temperature, seed=2)  # of a wider record the likeliest
    logits = logits_for(whole)
    expected, wanted_metrics = by_definition(logits, whole, objective)
    (wanted,) = torch.autograd.grad(expected, logits)

    parts = [rows_of(whole, begin, end) for begin, end in pairwise(cuts)]
    totals = {tag: float(count) for tag, count in objective.counts(parts).items()}
    loss, metrics = torch.zeros(()), dict.fromkeys(wanted_metrics, 0.0)
    for part, begin, end in zip(parts, cuts, cuts[1:], strict=False):
        result = objective(logits_output(logits[begin:end], torch.float64), part, totals)
        assert result.metrics.keys() == metrics.keys()
        loss = loss + result.loss
        metrics = {tag: metrics[tag] + float(result.metrics[tag]) for tag in metrics}
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)  # weights are fp32
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted, rtol=1e-6, atol=1e-8)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-6)

    summary = objective.summary(totals)
    without = (whole.annotations["teacher_ids"][..., 0] == NO_RECORD) & whole.loss_mask
    assert summary["tokens/without_record"] == int(without.sum()) > 0
    assert summary["weight/final"] == 1.9


@pytest.mark.parametrize(("beta", "tail"), [(0.0, "bucket"), (1.0, "drop"), (0.3, "renormalise")])
def test_with_every_id_it_is_the_divergence_of_whole_distributions(beta: float, tail: str) -> None:
    batch, teacher = scored(3, VOCAB, 2.0, seed=3, unscored=0.0)
    objective = TopKKD(SpanCE(1.0, 1.0), 1.0, beta, VOCAB, 2.0, tail)  # type: ignore[arg-type]
    totals = {tag: float(count) for tag, count in objective.counts([batch]).items()}
    assert objective.summary(totals)["tokens/without_record"] == 0
    logits = logits_for(batch)
    result = objective(logits_output(logits, torch.float64), batch, totals)
    (got,) = torch.autograd.grad(result.loss, logits)

    log_p, log_q = (teacher / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
    sides = {0.0: (log_p, log_q), 1.0: (log_q, log_p)}
    if beta in sides:
        kd = _kl(*sides[beta])
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        kd = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    spans = [batch.loss_mask & (batch.span_id == span) for span in SPANS.values()]
    expected = sum((4 * kd[chosen]).mean() for chosen in spans)
    assert isinstance(expected, Tensor)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    batch, teacher = scored(2, 4, 1.0, seed=4, unscored=0.0)
    objective = TopKKD(SpanCE(1.0, 1.0), 1.0, 0.0, 4, 1.0, "bucket")
    totals = {tag: float(count) for tag, count in objective.counts([batch]).items()}
    leaf = teacher.clone().requires_grad_()
    result = objective(logits_output(leaf, torch.float64), batch, totals)
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    assert abs(float(result.metrics["kd/final"])) < 1e-9 and float(gradient.abs().max()) < 1e-9
    assert float(result.metrics["teacher/agreement"]) == pytest.approx(1)


def test_a_micro_batch_of_padding_or_without_records_has_finite_numbers() -> None:
    batch, _ = scored(2, 4, 1.0, seed=5, unscored=1.1)
    objective = TopKKD(SpanCE(1.0, 1.0), 1.0, 1.0, 4)
    for loss_mask in (batch.loss_mask, torch.zeros_like(batch.loss_mask)):
        part, logits = replace(batch, loss_mask=loss_mask), logits_for(batch)
        totals = {tag: float(count) for tag, count in objective.counts([part]).items()}
        result = objective(logits_output(logits), part, totals)
        alone = objective.cross_entropy(logits_output(logits), part, totals)
        torch.testing.assert_close(result.loss, alone.loss)
        (gradient,) = torch.autograd.grad(result.loss, logits)
        assert torch.equal(gradient.isfinite(), torch.ones_like(gradient, dtype=torch.bool))
        assert all(value.isfinite() for value in result.metrics.values()) and not result.metrics["kd/final"]


def test_built_from_the_configuration() -> None:
    fields = {"kd_alpha": 0.8, "kd_divergence": "jsd", "kd_beta": 0.25, "kd_top_k": 8, "kd_temperature": 2.0}
    built = build_objective(tiny_config(objective="topk_kd", kd_span_weight_final=3.0, kd_tail="drop", **fields))
    assert built == TopKKD(SpanCE(1.0, 3.0), 0.8, 0.25, 8, 2.0, "drop")
    ids, log_p = built.needs.annotations
    assert (ids.name, ids.width, log_p.width, log_p.temperature) == ("teacher_ids", 8, 8, 2.0)
    for divergence, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0)):
        built = build_objective(tiny_config(objective="topk_kd", kd_divergence=divergence))
        assert isinstance(built, TopKKD) and built.beta == beta


def test_records_of_another_teacher_than_asked_for_are_refused(tmp_path: Path) -> None:
    plain = read_manifest(small_dataset(tmp_path / "kd", train=4, valid=2))
    by = {"name": "iter_0000900", "run": "nano", "weights_sha256": "0123456789" * 6 + "abcd"}
    stored = replace(plain, teacher=TeacherRecords(count=4, vocab_size=50), teacher_is=by)
    for asked in (None, "nano", "iter_0000900", "01234567"):
        check_kinds(TopKKD(SpanCE(1.0, 1.0)), tiny_config(objective="topk_kd", kd_teacher=asked), [stored, plain])
    for other in ("nan", "0123", "gpt-oss", "12345678"):
        cfg = tiny_config(objective="topk_kd", kd_teacher=other)
        with pytest.raises(DataError, match="its records are of run nano, name iter_0000900, weights_sha256 0123"):
            check_kinds(TopKKD(SpanCE(1.0, 1.0)), cfg, [plain, stored])
        check_kinds(SpanCE(1.0, 1.0), cfg, [stored])  # reads none


def test_a_gpu_is_not_waited_for() -> None:
    objective = TopKKD(SpanCE(0.7, 1.9), 0.5, 0.0, 5, 2.0, "bucket")
    assert waits_of(objective, scored(2, 5, 2.0, seed=2)[0]) == []
