"""Norms and update sizes by rule: those of the weights before and after, and a step that is the same without them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.optim import assignment_table, build_optimizer, build_scheduler, learning_rates, sharded_optimizer
from megatron_vpmoe.optim.assignment import slug
from megatron_vpmoe.optim.group_sizes import GroupSizes
from megatron_vpmoe.planning.card import CARD, fake_mode, on_paper
from megatron_vpmoe.planning.counting import Counting
from megatron_vpmoe.training.step import train_step
from tests.tiny import TINY, random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "normuon and adamw": {},
    "without decay": {"weight_decay": 0.0},
    "adamw alone": {"optimizer": "adam"},
    "products in bf16": {"polar_express_dtype": "bfloat16"},
    "masters of bf16": {"bf16": True},
    "small stacks": {"normuon_stack_mib": 1},
}


def steps(count: int, *, measure: bool, **changes: Any) -> tuple[dict, dict, dict, dict[str, float]]:
    """Weights (masters) before the last step and after it, gradients, and what was measured in it."""
    cfg = tiny_config(clip_grad=0.0, **changes)
    torch.manual_seed(5)
    model = build_model(cfg)
    wrapped = wrap_for_training(model, cfg)
    optimizer, objective = build_optimizer([wrapped], cfg), build_objective(cfg)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def masters() -> dict[str, torch.Tensor]:
        held = [(piece.param, leaf) for member in optimizer.members for piece, leaf in member._held]
        return {names[id(param)]: leaf.detach().double().clone() for param, leaf in held}

    before, groups = {}, {}
    for seed in range(count):
        before = masters()
        batch = random_batch(4, TINY["seq_length"], TINY["padded_vocab_size"], seed=seed)
        groups = train_step(wrapped, optimizer, objective, [batch], measure=measure).groups
    gradients = {name: vars(parameter)["main_grad"].double().clone() for name, parameter in model.named_parameters()}
    return before, masters(), gradients, groups


QUICK = "masters of bf16"


@pytest.mark.parametrize(
    "optimizer", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS if name != QUICK)]
)
def test_what_is_measured_is_what_happened_and_happens_without(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_optimizer, "_BLOCK_BYTES", 4096)  # several blocks, and one of a larger piece alone
    changes = OPTIMIZERS[optimizer]
    before, after, gradients, groups = steps(2, measure=True, **changes)
    rules: dict[str, list[str]] = {}
    for row in assignment_table(build_model(cfg := tiny_config(**changes)), cfg):
        rules.setdefault(slug(row.rule), []).append(row.name)
    assert {tag.split("/")[1] for tag in groups} == set(rules) and len(rules) == 11
    rel = 2e-2 if changes.get("bf16") or changes.get("polar_express_dtype") else 1e-3
    for rule, names in rules.items():
        moved = torch.cat([(after[name] - before[name]).flatten() for name in names])
        weights = torch.cat([after[name].flatten() for name in names])
        assert groups[f"update_rms/{rule}"] == pytest.approx(float(moved.norm()) / math.sqrt(len(moved)), rel=rel), rule
        assert groups[f"update_ratio/{rule}"] == pytest.approx(float(moved.norm() / weights.norm()), rel=rel), rule
        assert groups[f"param_norm/{rule}"] == pytest.approx(float(weights.norm()), rel=1e-5), rule
        gradient = torch.cat([gradients[name].flatten() for name in names])
        assert groups[f"grad_norm/{rule}"] == pytest.approx(float(gradient.norm()), rel=1e-5), rule
    _, plain, _, nothing = steps(2, measure=False, **changes)
    assert nothing == {} and all(torch.equal(after[name], weight) for name, weight in plain.items())


def test_gradients_are_those_before_clipping_and_frozen_rules_are_left_out() -> None:
    cfg = tiny_config(clip_grad=1e-3, train_only="['*.mlp.router.weight', output_layer.weight]")
    wrapped = wrap_for_training(build_model(cfg), cfg)
    optimizer = build_optimizer([wrapped], cfg)
    batch = random_batch(4, TINY["seq_length"], TINY["padded_vocab_size"], seed=1)
    result = train_step(wrapped, optimizer, build_objective(cfg), [batch], measure=True)
    assert {tag.split("/")[1] for tag in result.groups} == {"router", "output_layer"}
    norms = [value for tag, value in result.groups.items() if tag.startswith("grad_norm/")]
    assert math.hypot(*norms) == pytest.approx(result.grad_norm, rel=1e-6) and result.grad_norm > 1e-2


def test_the_host_waits_once_however_many_numbers_there_are() -> None:
    counting = Counting(fake_mode(), 8, lambda mask: mask.numel())
    with on_paper("H100", 80 * 2**30, 8, counting):
        weights = [torch.nn.Parameter(torch.empty(4, number, device=CARD)) for number in (1, 2, 3)]
        members: Any = [
            SimpleNamespace(expert=expert, counted=lambda own=own: {leaf: leaf for leaf in own})
            for expert, own in ((False, weights[:2]), (True, weights[2:]))
        ]
        rules = dict(zip(weights, ("a", "b", "b"), strict=True))
        sizes = GroupSizes(members, rules, ["a", "b", "of no parameter"], {False: (), True: ()})
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        sizes.gradients()
        sizes.moved(weights, weights)
        assert not counting.counts.syncs
        sizes.finish()
    [(where, count)] = counting.counts.syncs.items()
    assert count == 1 and "group_sizes.py" in where[1]


def test_each_rule_has_its_learning_rate_and_multiplied_ones_their_own() -> None:
    cfg = tiny_config(
        lr_warmup_iters=2, lr_multipliers="[{pattern: '*.mlp.experts.fc1_weight', factor: 0.5}]", train_iters=10
    )
    model = build_model(cfg)
    optimizer = build_optimizer([model], cfg)
    scheduler, rows = build_scheduler(optimizer, cfg), assignment_table(model, cfg)
    for _ in range(6):
        rates = learning_rates(scheduler, rows, cfg)
        used = {group["lr"] for member in optimizer.members for group in member.param_groups}
        assert {tag for tag in rates if "/x" in tag} == {"lr/expert_matrices/x0.5"}
        assert rates["lr/expert_matrices/x0.5"] == pytest.approx(rates["lr/expert_matrices"] / 2)
        assert rates["lr"] == rates["lr/attention_matrices"] != rates["lr/router"]
        assert {round(rate, 12) for tag, rate in rates.items() if tag != "lr"} == {round(rate, 12) for rate in used}
        scheduler.step(1)
