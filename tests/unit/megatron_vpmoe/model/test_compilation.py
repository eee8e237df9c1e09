"""Compiled layers: whole graphs, as many as there are kinds of layers, whatever the batch; the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_vpmoe.model import compilation
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
SEQ, VOCAB = 48, 64
DENSE = {"num_experts": None, "router_dead_experts_warn": None}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 2, "recompute_method": "uniform"}


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Nothing compiled before, and nothing left behind."""
    for clear in (compilation._compiled.cache_clear, torch._dynamo.reset, counters.clear):
        clear()
    yield
    compilation._compiled.cache_clear()
    torch._dynamo.reset()


def model_of(num_layers: int = 8, **changes: object) -> VPModel:
    torch.manual_seed(5)
    model = build_model(tiny_config(num_layers=num_layers, **changes)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "value_residual_scale" in name:
                parameter.fill_(0.6)
    return model


def passed(model: VPModel, seed: int) -> list[torch.Tensor]:
    """Loss and every gradient."""
    batch = random_batch(2, SEQ, VOCAB, seed=seed)
    output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids, recurs=True))
    loss, _ = output.cross_entropy(batch.labels, batch.loss_mask, torch.ones(batch.labels.shape))  # type: ignore[union-attr]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained, materialize_grads=True)]


def close(ones: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, DENSE, FULL], ids=["experts", "dense", "recomputed"])
def test_whole_graphs_once_for_all_layers_and_documents(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are taken in as ever, and run as they are: what is compiled, and how often, not by what."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda method, **how: compiler(method, backend="aot_eager", **how))
    model, plain = model_of(compile="layers", **changes), model_of(**changes)
    assert model.state_dict().keys() == plain.state_dict().keys()
    found = passed(model, 0)
    # Before attention: the first layer, local ones, global ones; behind it: all; dense feed-forwards; shared experts.
    kinds = counters["stats"]["unique_graphs"]
    assert kinds == (5 if changes == DENSE else 6)
    for seed in (1, 2):
        close(found, passed(plain, seed - 1))
        found = passed(model, seed)
    assert counters["stats"]["unique_graphs"] == kinds, "something is compiled again for other documents"
    assert not counters["graph_break"]
    with torch.no_grad():
        passed_alone = model.eval()(*_prompt(7)), model(*_prompt(9))
    assert counters["stats"]["unique_graphs"] == kinds, "compiled for prompts"
    assert passed_alone[0].hidden_BSH.shape[1] == 7


def _prompt(length: int) -> tuple[torch.Tensor, SequenceLayout]:
    ids = torch.arange(length).view(1, -1)
    return ids, SequenceLayout(torch.zeros_like(ids, dtype=torch.int32), ids)


@pytest.mark.slow
def test_compiled_numbers() -> None:
    """By the compiler's own code for this machine."""
    close(passed(model_of(4, compile="layers"), 0), passed(model_of(4), 0))
