"""grpo: each variant against its formula in fp64, in value and gradient, however the global batch is split."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from plain_output import VOCAB, logits_for, logits_output, waits_of
from torch import Tensor

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.objectives import GRPO, build_objective
from tests.tiny import random_batch, rows_of, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
REWARDS = [{"function": "finished"}]


def sampled_batch(rows: int, seed: int) -> Batch:
    """Up to three answers a row, with log-probabilities far enough apart to be clipped and clamped on both sides."""
    batch = random_batch(rows, 32, VOCAB, seed)
    generator = torch.Generator().manual_seed(seed)
    about = -torch.rand(3, rows, 32, generator=generator) * 4 - 1
    advantage = torch.randn(rows, 3, generator=generator)
    names = ("sampled_log_p", "old_log_p", "reference_log_p")
    annotations = {**dict(zip(names, about, strict=True)), "advantage": advantage}
    return replace(batch, annotations=annotations)


def by_definition(logits: Tensor, batch: Batch, o: GRPO) -> Tensor:
    """The loss answer by answer and token by token."""
    log_probs = (logits / o.temperature).log_softmax(-1)
    answers = []
    for row in range(len(batch.tokens)):
        for document in range(3):
            places = (batch.loss_mask[row] & (batch.document_id[row] == document)).nonzero().flatten().tolist()
            if not places:
                continue
            advantage = batch.annotations["advantage"][row, document].double()
            p = torch.stack([log_probs[row, t, batch.labels[row, t]] for t in places])
            old, sampled, ref = (
                batch.annotations[f"{n}_log_p"][row, places].double() for n in ("old", "sampled", "reference")
            )
            ratios = (p - old).exp() if o.ratio == "token" else (p - old).mean().exp().expand(len(p))
            each = []
            for t, rho in enumerate(ratios):
                if o.surrogate == "cispo":
                    gain = min(rho.item(), 1 + o.clip_high) * advantage * p[t]
                else:
                    gain = torch.min(rho * advantage, rho.clamp(1 - o.clip_low, 1 + o.clip_high) * advantage)
                weight = math.exp(old[t] - sampled[t])
                loss = -gain * (1.0 if o.mismatch_clamp is None else min(weight, o.mismatch_clamp))
                each.append(loss + o.kl * ((ref[t] - p[t]).exp() - (ref[t] - p[t]) - 1))
            answers.append(torch.stack(each))
    if o.normalisation == "sequence":
        return torch.stack([one.mean() for one in answers]).mean()
    every = torch.cat(answers)
    return every.sum() / (len(every) if o.normalisation == "token" else len(answers) * o.longest)


def totals_of(objective: GRPO, batches: list[Batch]) -> dict[str, float]:
    return {key: float(value) for key, value in objective.counts(batches).items()}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"normalisation": "sequence"},
    {"normalisation": "constant", "longest": 23},
    {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
    {"ratio": "sequence", "normalisation": "sequence", "kl": 0.3},
    {"surrogate": "cispo", "clip_high": 1.5},
    {"kl": 0.1, "mismatch_clamp": None},
    {"temperature": 0.7, "mismatch_clamp": 1.1, "kl": 0.02},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("cuts", [[0, 4], [0, 1, 4], [0, 1, 2, 3, 4]], ids=str)
def test_equals_the_formula_in_value_and_gradient(variant: dict[str, Any], cuts: list[int]):
    batch, objective = sampled_batch(4, 0), GRPO(**variant)
    logits = logits_for(batch)
    expected = by_definition(logits, batch, objective)
    parts = [rows_of(batch, begin, end) for begin, end in pairwise(cuts)]
    totals = totals_of(objective, parts)
    results = [
        objective(logits_output(logits[begin:end], torch.float64), part, totals)
        for part, (begin, end) in zip(parts, pairwise(cuts), strict=True)
    ]
    loss = torch.stack([result.loss for result in results]).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    (got,), (wanted,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)
    assert wanted.any()
    assert sum(float(result.metrics["loss/total"]) for result in results) == pytest.approx(float(expected))
    assert not any(value.requires_grad for result in results for value in result.metrics.values())


def test_metrics_are_means_over_tokens():
    batch, objective = sampled_batch(3, 1), GRPO(kl=0.1, clip_low=0.1, clip_high=0.3)
    logits = logits_for(batch)
    metrics = objective(logits_output(logits, torch.float64), batch, totals_of(objective, [batch])).metrics
    mask = batch.loss_mask
    log_probs = logits.detach().log_softmax(-1)
    p = log_probs.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)[mask]
    old, sampled, reference = (batch.annotations[f"{n}_log_p"][mask].double() for n in ("old", "sampled", "reference"))
    advantage, rho = batch.per_token("advantage")[mask], (p - old).exp()
    expected = {
        "policy/entropy": -(log_probs.exp() * log_probs).sum(-1)[mask],
        "policy/clip_share_low": (rho < 0.9) & (advantage < 0),
        "policy/clip_share_high": (rho > 1.3) & (advantage > 0),
        "policy/kl_old": rho - 1 - rho.log(),  # of the answers, which the old weights wrote
        "policy/kl_reference": (reference - p).exp() - 1 - (reference - p),
        "policy/sampler_gap": (old - sampled).abs(),
        "policy/clamped_share": (old - sampled).exp() > 2.0,
    }
    assert metrics.keys() == expected.keys() | {"loss/total"}
    for tag, values in expected.items():
        assert float(metrics[tag]) == pytest.approx(float(values.double().mean()), rel=1e-9), tag
        assert float(metrics[tag]) > 0, tag
    of_cispo = GRPO(surrogate="cispo", clip_high=0.3)
    told = of_cispo(logits_output(logits, torch.float64), batch, totals_of(of_cispo, [batch])).metrics
    assert float(told["policy/clip_share_low"]) == 0
    assert float(told["policy/clip_share_high"]) == pytest.approx(float((rho > 1.3).double().mean()))


def test_without_a_step_between_the_gradient_is_the_policy_gradient():
    """At a ratio of 1 nothing is clipped: clip, cispo and log p times advantage have one gradient."""
    batch = sampled_batch(2, 2)
    logits = logits_for(batch)
    p = logits.log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
    at_once = {**batch.annotations, "old_log_p": p.detach(), "sampled_log_p": p.detach()}
    batch = replace(batch, annotations=at_once)
    wanted = torch.autograd.grad(-(p * batch.per_token("advantage"))[batch.loss_mask].mean(), logits)[0]
    for surrogate in ("clip", "cispo"):
        objective = GRPO(surrogate=surrogate)
        loss = objective(logits_output(logits, torch.float64), batch, totals_of(objective, [batch])).loss
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)


@pytest.mark.parametrize("elsewhere", [100.0, 0.0])
def test_a_batch_of_padding_has_a_zero_loss_with_a_gradient(elsewhere: float):
    """Also where no rank has an answer to train on."""
    batch, objective = sampled_batch(2, 5), GRPO(ratio="sequence", normalisation="sequence", kl=0.1)
    batch.loss_mask.zero_()
    logits = logits_for(batch)
    result = objective(
        logits_output(logits, torch.float64), batch, {"tokens/supervised": elsewhere, "answers": elsewhere / 25}
    )
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0 and not any(float(value) for value in result.metrics.values())
    assert logits.grad is not None and not logits.grad.any()


def test_a_reference_is_needed_where_it_counts():
    assert {one.name for one in GRPO(kl=0.1).needs.annotations} == {one.name for one in GRPO().needs.annotations} | {
        "reference_log_p"
    }
    assert GRPO().needs.depends_on_weights
    needed = {one.name: one.temperature for one in GRPO(kl=0.1, temperature=0.7).needs.annotations}
    assert needed == {"sampled_log_p": 0.7, "old_log_p": 0.7, "reference_log_p": 0.7, "advantage": 1.0}
    # With a weight of 0 one that is there is measured, and changes nothing.
    batch = sampled_batch(2, 3)
    logits, totals = logits_for(batch), totals_of(GRPO(), [batch])
    without = {name: value for name, value in batch.annotations.items() if name != "reference_log_p"}
    output = logits_output(logits, torch.float64)
    measured = GRPO()(output, batch, totals)
    assert float(measured.metrics["policy/kl_reference"]) > 0
    assert torch.equal(measured.loss, GRPO()(output, replace(batch, annotations=without), totals).loss)


def test_built_from_the_configuration():
    cfg = tiny_config(
        objective="grpo",
        rewards=REWARDS,
        grpo_ratio="sequence",
        grpo_clip_high=0.5,
        rollout_max_new_tokens=20,
        eval_interval=None,
    )
    assert build_objective(cfg) == GRPO(ratio="sequence", clip_high=0.5, longest=20)


@pytest.mark.parametrize(
    "field",
    [
        {"grpo_clip_low": 1.5},
        {"grpo_clip_high": -0.1},
        {"grpo_kl": -1},
        {"grpo_kl": 0.1},
        {"rollout_group_size": 1},
        {"rewards": None},
        {"rollout_max_new_tokens": 48},
        {"rewards": []},
        {"rewards": [*REWARDS, {"function": "some.module:finished"}]},
        {"global_batch_size": 3},
        {"rollout_prompts": "some.jsonl", "eval_interval": 5},
        {"rollout_valid_prompts": "some.jsonl"},
        {"grpo_clip_low": 0.3, "grpo_surrogate": "cispo"},
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_by_name(field: dict[str, Any]):
    sampled = {"objective": "grpo", "rewards": REWARDS, "rollout_max_new_tokens": 20, "eval_interval": None}
    tiny_config(**sampled)
    with pytest.raises(ConfigError, match=next(iter(field))):
        tiny_config(**{**sampled, **field})


@pytest.mark.parametrize("variant", [{}, {"ratio": "sequence", "normalisation": "sequence", "kl": 0.3}])
def test_a_gpu_is_not_waited_for(variant: dict[str, Any]) -> None:
    assert waits_of(GRPO(**variant), sampled_batch(2, seed=3)) == []
