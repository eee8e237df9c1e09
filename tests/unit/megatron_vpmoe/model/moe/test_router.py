"""Routing: tokens conserved, padding left out, and a balance loss that does not depend on how the batch is split."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import get_default_pg_collection

from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.model.moe.real_tokens import RealTokens
from megatron_vpmoe.model.moe.router import VPMoERouter, sequence_balance_loss
from megatron_vpmoe.model.transformer_config import transformer_config
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.optim import build_optimizer
from megatron_vpmoe.training.router import RouterMonitor
from megatron_vpmoe.training.step import train_step
from tests.tiny import random_batch, rows_of, tiny_config

SEQ, ROWS, EXPERTS, TOPK = 12, 4, 8, 2


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(SEQ, ROWS, EXPERTS, generator=generator, dtype=torch.float64)
    scores = scores / scores.sum(-1, keepdim=True)
    real = torch.arange(SEQ)[:, None] < torch.tensor([12, 5, 9, 1])
    return scores, scores.topk(TOPK, dim=-1).indices, real


def balance_loss(scores: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    tokens = RealTokens(~real.t(), TOPK)
    return sequence_balance_loss(scores, scores.sum(-1), chosen.transpose(0, 1), tokens, coefficient=0.1)


def test_balance_loss_does_not_depend_on_the_split() -> None:
    scores, chosen, real = inputs()
    whole = balance_loss(scores, chosen, real)
    rows = zip(scores.split(1, dim=1), chosen.split(1, dim=1), real.split(1, dim=1), strict=True)
    parts = [balance_loss(*row) for row in rows]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_balance_loss_by_definition() -> None:
    scores, chosen, real = inputs()
    routing = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
    expected = 0.0
    for row in range(ROWS):
        tokens = int(real[:, row].sum())
        load = routing[:tokens, row].double().sum(0) * EXPERTS / (TOPK * tokens)
        expected += tokens * 0.1 * float((load * scores[:tokens, row].mean(0)).sum())
    assert balance_loss(scores * 3, chosen, real) == pytest.approx(expected)


@pytest.mark.usefixtures("single_process")
def test_routing_conserves_tokens_and_ignores_padding() -> None:
    router = VPMoERouter(transformer_config(tiny_config()), get_default_pg_collection()).train()
    hidden = torch.randn(SEQ, ROWS, 32, generator=torch.Generator().manual_seed(0))
    _, _, real = inputs()
    probs, routing = router(hidden, ~real)
    assert torch.equal(routing.sum(1), torch.full((SEQ * ROWS,), TOPK))
    torch.testing.assert_close(probs.sum(1), torch.full((SEQ * ROWS,), 2.5))
    assert router.tokens_per_expert.sum() == TOPK * real.sum()
    assert torch.equal(router.tokens_per_expert, router.local_tokens_per_expert)
    per_group = routing.view(-1, 4, EXPERTS // 4).any(-1).sum(1)
    assert per_group.max() <= 2, "more than group_topk groups"


@pytest.mark.usefixtures("single_process")
def test_evaluation_counts_nothing() -> None:
    router = VPMoERouter(transformer_config(tiny_config()), get_default_pg_collection()).eval()
    router(torch.randn(SEQ, ROWS, 32))
    assert router.tokens_per_expert.sum() == 0


@pytest.mark.usefixtures("single_process")
def test_expert_bias_decides_the_choice_and_not_the_weight() -> None:
    """A raised bias brings an expert into every top-k; the weights still sum to the scaling factor."""
    router = VPMoERouter(transformer_config(tiny_config()), get_default_pg_collection()).eval()
    hidden = torch.randn(SEQ, ROWS, 32, generator=torch.Generator().manual_seed(0))
    _, before = router(hidden)
    with torch.no_grad():
        router.expert_bias[0] += 10.0
    probs, after = router(hidden)
    assert before[:, 0].sum() < SEQ * ROWS
    assert after[:, 0].all()
    torch.testing.assert_close(probs.sum(1), torch.full((SEQ * ROWS,), 2.5))


@pytest.mark.usefixtures("single_process")
def test_group_limit_against_every_choice() -> None:
    """The chosen experts are the best of the groups that are best by the sum of their topk / group_topk best members,
    found by trying all (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
    router = VPMoERouter(transformer_config(tiny_config(moe_router_topk=4)), get_default_pg_collection()).eval()
    hidden = torch.randn(SEQ, ROWS, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.expert_bias.copy_(torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1)) * 0.1)
    _, chosen = router(hidden)
    scores = torch.sigmoid(hidden.reshape(-1, 32) @ router.weight.T) + router.expert_bias
    for token, row in enumerate(scores.tolist()):
        groups = [[2 * g, 2 * g + 1] for g in range(4)]
        best = max(
            itertools.combinations(groups, 2),
            key=lambda pair: sum(sum(sorted((row[e] for e in group), reverse=True)[:2]) for group in pair),
        )
        allowed = [expert for group in best for expert in group]
        expected = sorted(sorted(allowed, key=lambda e: -row[e])[:4])
        assert chosen[token].nonzero().flatten().tolist() == expected


@pytest.mark.usefixtures("single_process")
def test_bias_moves_against_the_load() -> None:
    """After a step the bias of an expert with more than the mean load has fallen by the update rate, else risen."""
    cfg = tiny_config(moe_router_bias_update_rate=1e-3)
    model = build_model(cfg)
    wrapped = wrap_for_training(model, cfg)
    optimizer, objective = build_optimizer([wrapped], cfg), build_objective(cfg)
    monitor = RouterMonitor(model, cfg)
    monitor.reset()
    batch = random_batch(4, 48, 64, seed=0)
    result = train_step(wrapped, optimizer, objective, [rows_of(batch, 0, 2), rows_of(batch, 2, 4)])
    routers = [module for module in model.modules() if isinstance(module, VPMoERouter)]
    assert len(routers) == 3
    for router in routers:
        load = router.tokens_per_expert
        assert load.sum() == 2 * result.metrics["tokens/real"]
        torch.testing.assert_close(router.expert_bias, 1e-3 * torch.sign(load.mean() - load))
    health = monitor.metrics(result.metrics["tokens/real"])
    assert health["moe/router_agg/expert_bias_range"] == pytest.approx(2e-3)
    assert monitor.load_LE is not None
    assert monitor.load_LE.tolist() == [router.tokens_per_expert.tolist() for router in routers]
