"""Replayed routing: tokens go where they were sent, their weights are learned as ever, and no other model follows."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import get_default_pg_collection

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.real_tokens import RealTokens
from megatron_vpmoe.model.moe.replay import recording, replaying
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.model.recompute import is_recomputing
from megatron_vpmoe.model.transformer_config import transformer_config
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
EXPERTS, TOPK, LAYERS, SEQ = 8, 2, 3, 48


def routing_of(rows: int, positions: int, layers: int = LAYERS, seed: int = 4) -> torch.Tensor:
    """uint8 [rows, positions, layers * TOPK]; any experts at all, also such as group limits forbid."""
    drawn = torch.rand(rows, positions, layers, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return drawn.topk(TOPK, -1).indices.flatten(2).to(torch.uint8)


def known(document_id: torch.Tensor) -> torch.Tensor:
    """Positions with a next one of the same document."""
    following = torch.cat([document_id[:, 1:], torch.full_like(document_id[:, :1], -1)], 1)
    return (document_id == following) & (document_id >= 0)


def model_of(**changes: object) -> VPModel:
    torch.manual_seed(5)
    return build_model(tiny_config(**changes)).train()


def run(model: VPModel, batch: Batch) -> torch.Tensor:
    output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    loss, _ = output.cross_entropy(batch.labels, batch.loss_mask, torch.ones(batch.labels.shape))  # type: ignore[union-attr]
    return loss


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_weights_and_gradient_are_those_of_the_scores_at_the_experts(score: str) -> None:
    changes = {"moe_router_score_function": score, "moe_router_dtype": "fp64", "moe_aux_loss_coeff": 0.0}
    if score == "softmax":
        changes |= {"moe_router_enable_expert_bias": False, "moe_router_load_balancing_type": "none"}
    router = VPMoERouter(transformer_config(tiny_config(**changes)), get_default_pg_collection()).train()
    document = random_batch(3, SEQ, 64, seed=2).document_id
    given, where = routing_of(3, SEQ, 1), known(document)
    hidden = torch.randn(SEQ, 3, 32, generator=torch.Generator().manual_seed(0))
    towards = torch.randn(SEQ, 3, EXPERTS, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        _, own = router.eval()(hidden)
    router.train()
    with replaying(router, given, document):
        probs, routing = router(hidden, document.T < 0)
    (probs.view_as(towards) * towards).sum().backward()

    weight = router.weight.detach().double().requires_grad_()
    logits = hidden.double() @ weight.T
    wanted = torch.zeros(3, SEQ, EXPERTS, dtype=torch.bool).scatter(-1, given.long(), True)
    wanted = torch.where(where.unsqueeze(-1), wanted, own.view(SEQ, 3, -1).transpose(0, 1)).transpose(0, 1)
    scores = logits.sigmoid() if score == "sigmoid" else logits.exp()
    scores = scores * wanted
    plain = 2.5 * scores / scores.sum(-1, keepdim=True)
    (plain * towards).sum().backward()
    assert torch.equal(routing.view_as(wanted), wanted) and not torch.equal(wanted, own.view_as(wanted))
    torch.testing.assert_close(probs.view_as(plain).double(), plain)
    assert weight.grad is not None and router.weight.grad is not None
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)
    # What moves the expert bias counts the experts that tokens went to, padding apart.
    assert torch.equal(router.tokens_per_expert.long(), wanted[document.T >= 0].sum(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_num_layers": 2, "recompute_method": "uniform"},
        {"recompute_granularity": "selective", "recompute_modules": "[moe]"},
    ],
    ids=["full", "moe"],
)
def test_a_recomputed_pass_replays_as_well(recompute: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, though the second pass scores the experts quite differently; it runs after the block has ended."""
    batch, given = random_batch(2, SEQ, 64, seed=1), routing_of(2, SEQ)
    maps: list[torch.Tensor] = []
    choose = VPMoERouter.chosen

    def watched(router: VPMoERouter, score: torch.Tensor, real: RealTokens) -> torch.Tensor:
        chosen = choose(router, 1 - score if is_recomputing() else score, real)
        maps.append(torch.zeros(len(chosen), EXPERTS, dtype=torch.bool).scatter(1, chosen, True))
        return chosen

    monkeypatch.setattr(VPMoERouter, "chosen", watched)
    model = model_of(**recompute)
    with replaying(model, given, batch.document_id):
        loss = run(model, batch)
    loss.backward()
    assert len(maps) == 2 * LAYERS
    where = known(batch.document_id).T.flatten()
    for layer in range(LAYERS):
        experts = given[..., layer * TOPK : (layer + 1) * TOPK].transpose(0, 1).flatten(0, 1).long()
        wanted = torch.zeros(len(experts), EXPERTS, dtype=torch.bool).scatter(1, experts, True)
        assert torch.equal(maps[layer][where], wanted[where])
        assert sum(torch.equal(maps[layer], again) for again in maps[LAYERS:]) == 1


def test_what_was_recorded_replays_to_the_same_bits_and_nothing_stays() -> None:
    batch, model, other = random_batch(2, SEQ, 64, seed=1), model_of(), model_of()
    with torch.no_grad(), recording(model) as take:
        free = run(model, batch)
        recorded = take().view(SEQ, 2, -1).transpose(0, 1)  # type: ignore[misc]
    assert recorded.dtype == torch.uint8 and recorded.shape[-1] == LAYERS * TOPK
    with torch.no_grad():
        with replaying(model, recorded, batch.document_id):
            assert torch.equal(run(model, batch), free)
        with replaying(model, routing_of(2, SEQ), batch.document_id):
            elsewhere, beside = run(model, batch), run(other, batch)
        assert not torch.equal(elsewhere, free), "the experts have to matter here"
        assert torch.equal(beside, free), "another model follows"
        assert torch.equal(run(model, batch), free), "what was replayed stays"
