"""Routing: tokens conserved, padding left out, and a balance loss that does not depend on how the batch is split."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import get_default_pg_collection

from megatron_vpmoe.model.moe.router import VPMoERouter, sequence_balance_loss
from megatron_vpmoe.model.transformer_config import transformer_config
from tests.tiny import tiny_config

SEQ, ROWS, EXPERTS, TOPK = 12, 4, 8, 2


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(SEQ, ROWS, EXPERTS, generator=generator, dtype=torch.float64)
    scores = scores / scores.sum(-1, keepdim=True)
    routing = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(TOPK, dim=-1).indices, True)
    real = torch.arange(SEQ)[:, None] < torch.tensor([12, 5, 9, 1])
    return scores, routing, real


def test_balance_loss_does_not_depend_on_the_split() -> None:
    scores, routing, real = inputs()
    whole = sequence_balance_loss(scores, routing, real, topk=TOPK, coefficient=0.1)
    rows = zip(scores.split(1, dim=1), routing.split(1, dim=1), real.split(1, dim=1), strict=True)
    parts = [sequence_balance_loss(*row, topk=TOPK, coefficient=0.1) for row in rows]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_balance_loss_by_definition() -> None:
    scores, routing, real = inputs()
    expected = 0.0
    for row in range(ROWS):
        tokens = int(real[:, row].sum())
        load = routing[:tokens, row].double().sum(0) * EXPERTS / (TOPK * tokens)
        expected += tokens * 0.1 * float((load * scores[:tokens, row].mean(0)).sum())
    assert sequence_balance_loss(scores, routing, real, topk=TOPK, coefficient=0.1) == pytest.approx(expected)


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
