"""What the inspector shows is what the model's own pass computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.model.attention.masks import left_padded
from megatron_vpmoe.model.attention.self_attention import VPSelfAttention
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.experts import StackedExperts
from megatron_vpmoe.model.moe.replay import recording
from tests.tiny import NANO_MOE, tiny_config
from vpmoe.eval.inspection import LONGEST, attention_of, routing_of

IDS = [5, 9, 3, 60, 1, 33, 33, 8, 21, 7, 7, 2, 40, 11]


@pytest.fixture(params=[{}, NANO_MOE], ids=["vpmoe", "nano_moe"])
def model(request: pytest.FixtureRequest, single_process: None) -> VPModel:
    torch.manual_seed(3)
    model = build_model(tiny_config(**request.param))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4) if parameter.dim() >= 2 else parameter.add_(0.5 * name.endswith("sink"))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
    return model.train()


def passed(model: VPModel) -> None:
    with torch.no_grad():
        model.eval()(*left_padded([IDS], torch.device("cpu")))


def test_experts_and_weights_are_those_that_the_pass_uses(model: VPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = routing_of(model, IDS)
    layers = sum(isinstance(module, StackedExperts) for module in model.modules())
    assert model.training and [*found] == [*range(5 - layers, 5)] and layers >= 3
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = StackedExperts.of_tokens

    def noted(self: StackedExperts, hidden: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor, *rest: Any):
        given.append((chosen, weight))
        return original(self, hidden, chosen, weight, *rest)

    monkeypatch.setattr(StackedExperts, "of_tokens", noted)
    with recording(model) as take:
        passed(model)
        recorded = take().view(len(IDS), layers, -1)  # type: ignore[misc]
    for place, routing in enumerate(found.values()):
        dense = np.zeros((len(IDS), 8), np.float32)
        np.put_along_axis(dense, routing.chosen, routing.weight, 1)
        wanted = torch.zeros(len(IDS), 8).scatter(1, given[place][0], given[place][1].float())
        np.testing.assert_allclose(dense, wanted.numpy(), rtol=1e-6)
        assert [*map(set, routing.chosen.tolist())] == [*map(set, recorded[:, place].tolist())]
        assert (np.diff(routing.weight) <= 0).all() and routing.load.sum() == 2 * len(IDS)
        assert (routing.entropy > 0).all() and (routing.entropy <= 1 + 1e-6).all()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_weights_times_values_are_what_the_layer_attends(
    model: VPModel, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = attention_of(model, IDS, number)
    computed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    attended: dict[int, torch.Tensor] = {}
    original = VPSelfAttention.attend

    def noted(self: VPSelfAttention, query, key, value, layout, _=None) -> torch.Tensor:
        attended[self.layer_number] = original(self, query, key, value, layout, computed)
        return attended[self.layer_number]

    monkeypatch.setattr(VPSelfAttention, "attend", noted)
    passed(model)
    values = computed[number][1][0]
    values = values.repeat_interleave(len(shown.weight) // len(values), 0)
    ours = torch.from_numpy(shown.weight) @ values
    torch.testing.assert_close(ours.transpose(0, 1).flatten(1), attended[number][:, 0], rtol=1e-4, atol=1e-5)
    assert (shown.has_sink and shown.sink.min() > 0) or not shown.has_sink
    for query in range(len(IDS)):
        outside = shown.weight[:, query, query + 1 :].sum()
        if shown.window is not None:
            outside += shown.weight[:, query, : max(0, query - shown.window + 1)].sum()
        assert outside == 0


def test_what_cannot_be_looked_into_is_told(model: VPModel) -> None:
    for ids, told in (
        ([], "0 tokens"),
        ([1] * (LONGEST + 1), "2,049 tokens"),
        ([1, 64], "token 64"),
        ([-1], "token -1"),
    ):
        with pytest.raises(DataError, match=told):
            routing_of(model, ids)
    with pytest.raises(DataError, match="no layer 5"):
        attention_of(model, IDS, 5)
