"""Compiled layers: whole graphs, as many as there are kinds of layers, whatever the batch; the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.profiling.capture import Subject
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process", "nothing_compiled")
SEQ, VOCAB = 48, 64
DENSE = {"num_experts": None, "router_dead_experts_warn": None}
MOE_AGAIN = {"recompute_granularity": "selective", "recompute_modules": "[moe]"}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 2, "recompute_method": "uniform"}


def model_of(num_layers: int = 8, **changes: Any) -> VPModel:
    torch.manual_seed(5)
    model = build_model(tiny_config(num_layers=num_layers, **changes)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "value_residual_scale" in name:
                parameter.fill_(0.6)
    return model


def passed(model: VPModel, seed: int, rows: int = 2) -> list[torch.Tensor]:
    """Loss and every gradient."""
    batch = random_batch(rows, SEQ, VOCAB, seed=seed)
    output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids, recurs=True))
    loss, _ = output.cross_entropy(batch.labels, batch.loss_mask, torch.ones(batch.labels.shape))  # type: ignore[union-attr]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained, materialize_grads=True)]


def routers(model: VPModel) -> list[torch.Tensor]:
    """What the passes have counted."""
    found = [module for module in model.modules() if isinstance(module, VPMoERouter)]
    return [counted for router in found for counted in (router.tokens_per_expert, router.balance_loss_sum)]


def close(ones: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "changes", "rows", "kinds"),
    [
        ("layers", DENSE, 1, 5),
        ("layers", FULL, 2, 6),
        ("step", {}, 1, 8),
        ("step", FULL, 2, 8),
        ("step", MOE_AGAIN, 2, 8),
        ("step", {"activation": "swiglu"}, 2, 8),
    ],
    ids=["dense", "recomputed", "experts", "experts recomputed", "experts recomputed alone", "gated experts"],
)
def test_whole_graphs_once_for_all_layers_and_documents(
    choice: str, changes: dict[str, Any], rows: int, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are taken in as ever, and run as they are: what is compiled, and how often, not by what."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda method, **how: compiler(method, backend="aot_eager", **how))
    model, plain = model_of(compile=choice, **changes), model_of(**changes)
    assert model.state_dict().keys() == plain.state_dict().keys()
    # Before attention: the first layer, local ones, global ones; behind it: all; dense feed-forwards; shared experts.
    # Of a step besides the choice of experts, and what follows from it.
    for seed in range(3):
        close(passed(model, seed, rows), passed(plain, seed, rows))
        assert counters["stats"]["unique_graphs"] == kinds, "something is compiled again for other documents"
    assert not counters["graph_break"]
    for mine, others in zip(routers(model), routers(plain), strict=True):
        torch.testing.assert_close(mine, others)
    with torch.no_grad():
        passed_alone = model.eval()(*_prompt(7)), model(*_prompt(9))
    assert counters["stats"]["unique_graphs"] == kinds, "compiled for prompts"
    assert passed_alone[0].hidden_BSH.shape[1] == 7


def _prompt(length: int) -> tuple[torch.Tensor, SequenceLayout]:
    ids = torch.arange(length).view(1, -1)
    return ids, SequenceLayout(torch.zeros_like(ids, dtype=torch.int32), ids)


@pytest.mark.slow
def test_compiled_numbers() -> None:
    """By the compiler's own code for this machine: 30 steps of two micro-batches, and a pass with its gradients."""
    losses: dict[str, list[float]] = {"step": [], "off": []}
    for choice, of_choice in losses.items():
        torch.manual_seed(5)
        subject = Subject(tiny_config(compile=choice))
        for _ in range(30):
            subject.step()
            of_choice.append(subject.loss)
    torch.testing.assert_close(losses["step"], losses["off"], rtol=1e-4, atol=0.0)
    assert losses["off"][-1] < losses["off"][0] - 0.05
    close(passed(model_of(4, compile="step"), 0), passed(model_of(4), 0))
