"""on_policy: both losses against their formulas in fp64, in value, gradient and metrics, in any split."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from plain_output import VOCAB, logits_for, logits_output, waits_of
from torch import Tensor

from megatron_vpmoe.data.batch import Batch, Span
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.objectives import OnPolicy, build_objective
from ref import output as reference
from tests.tiny import random_batch, rows_of, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"clamp": None},
    {"clamp": 1.1, "temperature": 0.7},
    {"loss": "topk", "top_k": 4},
    {"loss": "topk", "top_k": 5, "temperature": 1.6},
    {"loss": "topk", "top_k": VOCAB},
]


def scored(rows: int, seed: int, o: OnPolicy) -> Batch:
    """Up to three documents a row, about two thirds of them sampled, and what sampler and teacher say of them."""
    batch, generator = random_batch(rows, 32, VOCAB, seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, 32, VOCAB, generator=generator, dtype=torch.float64)
    sampler, teacher = (2 * logits / o.temperature).log_softmax(-1)
    labels = batch.labels.unsqueeze(-1)
    log_p, ids = teacher.topk(min(o.top_k + 1, VOCAB))
    annotations = {
        "is_sampled": (torch.rand(rows, 3, generator=generator) < 0.65).to(torch.uint8),
        "sampled_log_p": sampler.gather(-1, labels).squeeze(-1).float(),
        "teacher_ids": ids.int(),
        "teacher_log_p": log_p.float(),
        "teacher_label_log_p": teacher.gather(-1, labels).squeeze(-1).float(),
    }
    return replace(batch, annotations=annotations)


def by_definition(logits: Tensor, batch: Batch, o: OnPolicy) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics, token by token. The gradient of "sampled" is that of -w a log p, its value that of -w a."""
    costs, told, means = list[Tensor](), list[Tensor](), dict[str, list[float]]()
    for row, column in batch.loss_mask.nonzero().tolist():
        z, label = logits[row, column], int(batch.labels[row, column])
        if not batch.annotations["is_sampled"][row, int(batch.document_id[row, column])]:
            costs.append(-reference.log_probability(z, label))
            told.append(costs[-1])
            means.setdefault("loss/anchor", []).append(float(told[-1].detach()))
            continue
        log_p = reference.log_probability(z / o.temperature, label)
        log_q, log_s = (
            batch.annotations[name][row, column].double() for name in ("teacher_label_log_p", "sampled_log_p")
        )
        now = log_p.detach()
        each = {"gap/total": now - log_q, "policy/sampler_gap": (now - log_s).abs()}
        each[f"gap/{Span(int(batch.span_id[row, column])).name.lower()}"] = now - log_q
        if o.loss == "sampled":
            weight = (now - log_s).exp()
            each["policy/clamped_share"] = (weight > (o.clamp or torch.inf)).double()
            weight = weight if o.clamp is None else weight.clamp(max=o.clamp)
            costs.append(weight * (now - log_q) * log_p)
            told.append(weight * (now - log_q))
        else:
            ids, log_k = (batch.annotations[f"teacher_{name}"][row, column, : o.top_k] for name in ("ids", "log_p"))
            tau = o.temperature
            costs.append(reference.divergence(z, ids.long(), log_k, beta=1.0, tail="bucket", temperature=tau) / tau**2)
            told.append(costs[-1])
            each["teacher/captured_mass"] = log_k.exp().sum()
            each["teacher/agreement"] = (z.argmax() == ids[0]).double()
        each["loss/policy"] = told[-1]
        for tag, value in each.items():
            means.setdefault(tag, []).append(float(value.detach()))
    metrics = {tag: sum(values) / len(values) for tag, values in means.items()}
    metrics["loss/total"] = float(torch.stack(told).detach().mean())
    return torch.stack(costs).mean(), metrics


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("cuts", [[0, 4], [0, 1, 4], [0, 1, 2, 3, 4]], ids=str)
def test_equals_the_formula_in_value_and_gradient(variant: dict[str, Any], cuts: list[int]) -> None:
    objective = OnPolicy(**variant)
    batch = scored(4, 1, objective)
    logits = logits_for(batch)
    expected, wanted_metrics = by_definition(logits, batch, objective)
    (wanted,) = torch.autograd.grad(expected, logits)
    parts = [rows_of(batch, begin, end) for begin, end in pairwise(cuts)]
    totals = {tag: float(count) for tag, count in objective.counts(parts).items()}
    loss, metrics = torch.zeros((), dtype=torch.float64), dict.fromkeys(wanted_metrics, 0.0)
    for part, (begin, end) in zip(parts, pairwise(cuts), strict=True):
        result = objective(logits_output(logits[begin:end], torch.float64), part, totals)
        assert result.metrics.keys() == metrics.keys()
        loss = loss + result.loss
        metrics = {tag: metrics[tag] + float(result.metrics[tag]) for tag in metrics}
        assert not any(value.requires_grad for value in result.metrics.values())
    assert float(loss.detach()) == pytest.approx(wanted_metrics["loss/total"], rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted, rtol=1e-6, atol=1e-9)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5)
    told = objective.summary(totals)
    assert told["anchor/share"] == told["tokens/anchor"] / int(batch.loss_mask.sum()) > 0.1
    assert told["tokens/sampled"] == told["sampled/analysis"] + told["sampled/final"] > 0


def test_in_expectation_both_losses_have_one_gradient() -> None:
    """Over all tokens that may be drawn at a position, weighed by their probability: that of KL(student, teacher)."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(VOCAB, generator=generator, dtype=torch.float64)
    log_q = torch.randn(VOCAB, generator=generator, dtype=torch.float64).log_softmax(-1)
    whole = random_batch(1, VOCAB + 1, VOCAB, 0)
    labels, nowhere = torch.arange(VOCAB + 1).clamp(max=VOCAB - 1)[None], torch.zeros(1, VOCAB + 1)
    log_p = z.log_softmax(-1)
    batch = replace(
        whole,
        labels=labels,
        document_id=nowhere.int(),
        loss_mask=torch.arange(VOCAB + 1)[None] < VOCAB,
        annotations={
            "is_sampled": torch.ones(1, 1, dtype=torch.uint8),
            "sampled_log_p": log_p[labels],
            "teacher_label_log_p": log_q[labels],
            "teacher_ids": torch.arange(VOCAB).expand(1, VOCAB + 1, VOCAB).int(),
            "teacher_log_p": log_q.expand(1, VOCAB + 1, VOCAB),
        },
    )
    found = {}
    for loss in ("sampled", "topk"):
        objective = OnPolicy(loss=loss, top_k=VOCAB)
        leaf = z.expand(1, VOCAB + 1, VOCAB).clone().requires_grad_()
        result = objective(
            logits_output(leaf, torch.float64),
            batch,
            {"tokens/sampled": 1.0, "tokens/anchor": 0.0, "sampled/analysis": 1.0, "sampled/final": 1.0},
        )
        (gradient,) = torch.autograd.grad(result.loss, leaf)
        found[loss] = (gradient[0, :VOCAB] * log_p.exp()[:, None]).sum(0)
    p = log_p.exp()
    wanted = p * (log_p - log_q - (p * (log_p - log_q)).sum())
    torch.testing.assert_close(found["sampled"], wanted)
    torch.testing.assert_close(found["topk"], wanted, rtol=1e-6, atol=1e-9)


def test_a_batch_of_padding_has_a_zero_loss_with_a_gradient() -> None:
    for loss in ("sampled", "topk"):
        objective = OnPolicy(loss=loss, top_k=4)
        batch = scored(2, 5, objective)
        batch.loss_mask.zero_()
        logits = logits_for(batch)
        totals = {"tokens/sampled": 9.0, "tokens/anchor": 2.0, "sampled/analysis": 4.0, "sampled/final": 5.0}
        result = objective(logits_output(logits, torch.float64), batch, totals)
        result.loss.backward()
        assert float(result.loss.detach()) == 0.0 and not any(float(value) for value in result.metrics.values())
        assert logits.grad is not None and not logits.grad.any()


ASKED = {
    "objective": "on_policy",
    "teacher_weights": "runs/teacher",
    "rollout_groups": 4,
    "rollout_group_size": 1,
    "rollout_max_new_tokens": 20,
    "eval_interval": None,
}
PARTS = {
    "curriculum": '[{"from_share": 0, "low": 1}, {"from_share": 0.5, "high": 1, "rollouts": 2}]',
    "curriculum_tokens": 1000,
    "rollout_prompts": "prompts.jsonl",
    "rollout_group_size": 8,
}


def test_built_from_the_configuration_and_needs_a_teacher() -> None:
    cfg = tiny_config(**ASKED, opd_loss="topk", kd_top_k=7, rollout_temperature=0.8)
    objective = build_objective(cfg)
    assert objective == OnPolicy("topk", 2.0, 7, 0.8) and objective.needs.depends_on_weights
    needed = {one.name: (one.temperature, one.width) for one in objective.needs.annotations}
    assert needed["teacher_log_p"] == (0.8, 7) and needed["sampled_log_p"] == (0.8, None)
    names = {one.name for one in OnPolicy().needs.annotations}
    assert names == {"sampled_log_p", "is_sampled", "teacher_label_log_p"}


@pytest.mark.parametrize(
    "field",
    [
        {"teacher_weights": None},
        {"kd_top_k": 65, "opd_loss": "topk"},
        {"opd_anchor_share": 0.96},
        {"opd_anchor_share": -0.1},
        {"opd_clamp": 0.5},
        {"opd_clamp": 3.0, "opd_loss": "topk"},
        {"kd_top_k": 5},
        {"kd_alpha": 0.7},
        {"grpo_kl": 0.1},
        {"reference_weights": "runs/other"},
        {"rollout_max_new_tokens": 48},
        {"rollout_attempts": 2},
        {"rollout_groups": 3},
        {"curriculum": '[{"from_share": 0, "low": 1}]'},
        {**PARTS, "curriculum": '[{"from_share": 0.1, "low": 1}]'},
        {**PARTS, "curriculum": '[{"from_share": 0, "low": 1}, {"from_share": 0, "low": 1}]'},
        {**PARTS, "curriculum": '[{"from_share": 0, "low": 0.6, "high": 0.6}]'},
        {**PARTS, "curriculum": '[{"from_share": 0, "higher": 1}]'},
        {**PARTS, "curriculum": '[{"from_share": 0, "low": 1, "rollouts": 0}]'},
        {**PARTS, "rollout_groups": 3},
        {**PARTS, "rollout_prompts": None},
        {"curriculum_tokens": 9},
        {"collapse": "stop"},
        {"collapse_length": 20.0},
        {"collapse_repetition": 1.5},
        {"rewards": []},
        {"objective": "topk_kd", "opd_clamp": 3.0},
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_by_name(field: dict[str, Any]) -> None:
    tiny_config(**ASKED)
    tiny_config(**{**ASKED, **PARTS})
    with pytest.raises(ConfigError, match=next(iter(field))):
        tiny_config(**{**ASKED, **field})


@pytest.mark.parametrize("variant", [{}, {"loss": "topk", "top_k": 4}], ids=str)
def test_a_gpu_is_not_waited_for(variant: dict[str, Any]) -> None:
    assert waits_of(OnPolicy(**variant), scored(2, 3, OnPolicy(**variant))) == []
