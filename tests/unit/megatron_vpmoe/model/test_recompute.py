"""Recomputation: nothing about a step changes, bit for bit, but the memory that its activations hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.real_tokens import RealTokens
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.model.recompute import Recomputation, is_recomputing, recomputed
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

SEQ, VOCAB = 48, 64
DENSE = {"num_experts": None, "router_dead_experts_warn": None}
MOE: dict[str, object] = {}
GATED: dict[str, object] = {"activation": "swiglu"}


def selective(*modules: str) -> dict[str, object]:
    return {"recompute_granularity": "selective", "recompute_modules": f"[{', '.join(modules)}]"}


def full(method: str | None = None, num_layers: int | None = None) -> dict[str, object]:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": num_layers}


@dataclass
class Step:
    """One forward and backward pass and what it left."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    into_first_values: torch.Tensor
    bookkeeping: dict[str, torch.Tensor]
    random_state: torch.Tensor
    saved_bytes: int


def lively_model(**changes: Any) -> VPModel:
    """λ of the value residual well below 1, so that much of the gradient goes into layer 1's values."""
    torch.manual_seed(5)
    model = build_model(tiny_config(**changes)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "value_residual_scale" in name:
                parameter.fill_(0.6)
            elif parameter.dim() >= 2:
                parameter *= 4
    return model


def step(**changes: Any) -> Step:
    model = lively_model(**changes)
    batch = random_batch(2, SEQ, VOCAB, seed=1)
    first_values: list[torch.Tensor] = []
    # The hook fires with the whole gradient: from layer 1's own attention and from every later layer.
    attention: Any = model.decoder.layers[0].self_attention
    project = attention.project_qkv

    def watched(hidden: torch.Tensor):
        query, key, value = project(hidden)
        if value.requires_grad:
            value.register_hook(first_values.append)
        return query, key, value

    attention.project_qkv = watched
    storages: dict[int, torch.UntypedStorage] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    saved = sum(storage.nbytes() for storage in storages.values())
    loss, _ = output.cross_entropy(batch.labels, batch.loss_mask, torch.ones(batch.labels.shape))
    loss.backward()
    routers = [(name, module) for name, module in model.named_modules() if isinstance(module, VPMoERouter)]
    return Step(
        loss=loss.detach(),
        gradients={name: parameter.grad for name, parameter in model.named_parameters()},
        into_first_values=first_values[-1],
        bookkeeping={
            f"{name}.{buffer}": getattr(router, buffer)
            for name, router in routers
            for buffer in ("tokens_per_expert", "balance_loss_sum", "local_tokens_per_expert")
        },
        random_state=torch.get_rng_state(),
        saved_bytes=saved,
    )


_plain: dict[int, Step] = {}


def plain(stack: dict[str, object]) -> Step:
    if id(stack) not in _plain:
        _plain[id(stack)] = step(**stack)
    return _plain[id(stack)]


CASES = [
    pytest.param(MOE, full(), id="moe full"),
    pytest.param(MOE, full("uniform", 3), id="moe full uniform 3"),
    pytest.param(MOE, full("block", 2), id="moe full block 2"),
    pytest.param(MOE, selective("core_attn"), id="moe core_attn"),
    pytest.param(MOE, selective("mlp"), id="moe mlp"),
    pytest.param(MOE, selective("moe"), id="moe moe"),
    pytest.param(MOE, selective("shared_experts"), id="moe shared_experts"),
    pytest.param(MOE, selective("core_attn", "mlp", "moe"), id="moe all parts"),
    pytest.param(GATED, selective("moe"), id="gated experts moe"),
    pytest.param(DENSE, full(), id="dense full"),
    pytest.param(DENSE, full("block", 1), id="dense full block 1"),
    pytest.param(DENSE, selective("core_attn", "mlp"), id="dense core_attn and mlp"),
]


@pytest.mark.parametrize(("stack", "recompute"), CASES)
def test_nothing_changes_but_memory(stack: dict[str, object], recompute: dict[str, object]) -> None:
    expected, actual = plain(stack), step(**stack, **recompute)
    assert torch.equal(actual.loss, expected.loss)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        other = actual.gradients[name]
        assert gradient is not None and other is not None and gradient.any(), name
        assert torch.equal(other, gradient), name
    assert torch.equal(actual.into_first_values, expected.into_first_values)
    for name, count in expected.bookkeeping.items():
        assert torch.equal(actual.bookkeeping[name], count), name
    assert torch.equal(actual.random_state, expected.random_state)
    assert actual.saved_bytes < expected.saved_bytes


def test_later_layers_take_part_in_the_gradient_into_the_first_values() -> None:
    """Without the value residual it is another one: the comparison above would notice a lost contribution."""
    without = step(**MOE, value_residual=False).into_first_values
    assert not torch.allclose(plain(MOE).into_first_values, without, rtol=1e-2)


def test_bookkeeping_counts_each_token_once() -> None:
    batch = random_batch(2, SEQ, VOCAB, seed=1)
    counts = [count for name, count in plain(MOE).bookkeeping.items() if name.endswith(".tokens_per_expert")]
    assert [int(count.sum()) for count in counts] == [2 * int((batch.document_id >= 0).sum())] * 3


def test_more_recomputation_keeps_less() -> None:
    saved = [
        step(**MOE, **changes).saved_bytes
        for changes in (full(), full("uniform", 2), full("block", 2), selective("moe"), selective("shared_experts"))
    ]
    each, pairs, half, moe, shared = saved
    assert pairs < each < half
    assert moe < shared < plain(MOE).saved_bytes
    # What full recomputation keeps: each layer's input, layer 1's values, masks and the output. No layer's inside.
    assert each < 0.35 * plain(MOE).saved_bytes


def test_bf16_gradients_do_not_change_either() -> None:
    expected, actual = step(bf16=True), step(bf16=True, **full("uniform", 2))
    for name, gradient in expected.gradients.items():
        other = actual.gradients[name]
        assert gradient is not None and other is not None and torch.equal(other, gradient), name


@pytest.mark.parametrize("recompute", [full("uniform", 2), selective("moe")])
def test_a_recomputed_token_goes_where_it_went(recompute: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums on a GPU may differ from pass to pass; here the second pass scores the experts quite differently."""
    maps: dict[str, list[torch.Tensor]] = {}
    gating, choose = VPMoERouter.gating, VPMoERouter.chosen

    def differing(router: VPMoERouter, hidden: torch.Tensor) -> torch.Tensor:
        logits = gating(router, hidden)
        return logits.flip(-1) if is_recomputing() else logits

    def watched(router: VPMoERouter, score: torch.Tensor, real: RealTokens) -> torch.Tensor:
        chosen = choose(router, score, real)
        maps.setdefault(str(router.layer_number), []).append(chosen.clone())
        return chosen

    monkeypatch.setattr(VPMoERouter, "gating", differing)
    monkeypatch.setattr(VPMoERouter, "chosen", watched)
    counted = step(**MOE, **recompute).bookkeeping
    assert len(maps) == 3
    for first, again in maps.values():
        assert torch.equal(first, again)
    real = 2 * int((random_batch(2, SEQ, VOCAB, seed=1).document_id >= 0).sum())
    loads = [load for name, load in counted.items() if name.endswith("tokens_per_expert")]
    assert [int(load.sum()) for load in loads] == [real] * 6, "a load counted twice would move the expert bias twice"


def test_no_state_of_a_generator_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_arguments: object) -> torch.Tensor:
        raise AssertionError("reading a generator's state waits for the device, and nothing draws")

    monkeypatch.setattr(torch, "get_rng_state", read)
    x = torch.ones(3, requires_grad=True)
    recomputed(lambda x: x.sin().exp(), x).sum().backward()
    assert x.grad is not None


def test_runs_cover_every_layer_once() -> None:
    layers = list(range(1, 8))
    for recomputation, expected in (
        (Recomputation(), [(layers, False)]),
        (Recomputation("selective", modules=("moe",)), [(layers, False)]),
        (Recomputation("full"), [([n], True) for n in layers]),
        (Recomputation("full", num_layers=3), [([1, 2, 3], True), ([4, 5, 6], True), ([7], True)]),
        (Recomputation("full", "block", 2), [([1], True), ([2], True), ([3, 4, 5, 6, 7], False)]),
    ):
        assert recomputation.runs(layers) == expected
