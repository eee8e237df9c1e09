"""The arithmetic of FLOPs against a count of the products that a model carries out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_vpmoe.config import (
    RunConfig,
    forward_flops_per_token,
    layer_geometries,
    training_flops_per_token,
)
from megatron_vpmoe.model.attention import tpa
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model, freeze_parameters
from tests.tiny import MIXTURE, tiny_config

DESIGNS: dict[str, dict[str, Any]] = {
    "vpMoE": {},
    "other ranks, no shared expert": {"tpa_rank": 1, "tpa_q_rank": 3, "moe_shared_expert_intermediate_size": None},
    "dense": {"num_experts": None},
    "plain SwiGLU, tied": {
        "num_experts": None,
        "activation": "swiglu",
        "window_size": None,
        "tpa": False,
        "global_position_embedding": "rope",
        "untie_embeddings_and_output_weights": False,
    },
}


@pytest.fixture(autouse=True)
def products_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest of TPA's are sums on a CPU, which no counter takes for products."""
    monkeypatch.setattr(tpa, "_FEW", 0)


def grouped_flops(x: tuple[int, ...], weight: tuple[int, ...], *_: object, **__: object) -> int:
    """torch.grouped_mm of [N, I] with [E, I, O]: each row meets one expert."""
    return 2 * x[0] * x[1] * weight[2]


def product_flops(_: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], **__: object) -> int:
    """torch.baddbmm_ of [N, R, K] and [N, K, C], of which torch's counter knows the form that is not in place."""
    return 2 * left[0] * left[1] * left[2] * right[2]


OURS = {torch.ops.aten._grouped_mm: grouped_flops, torch.ops.aten.baddbmm_: product_flops}


def counted(cfg: RunConfig, tokens: int) -> int:
    """FLOPs of one forward pass and the logits over one document, on the backend with dense scores."""
    model = build_model(cfg).eval()
    layout = SequenceLayout(torch.zeros(1, tokens, dtype=torch.int32), torch.arange(tokens)[None])
    counter = FlopCounterMode(display=False, custom_mapping=OURS)
    with torch.no_grad(), counter:
        model(torch.ones(1, tokens, dtype=torch.int64), layout).logits()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", DESIGNS)
def test_one_token(name: str, single_process: None) -> None:
    """One token sees one key, whatever the kind of layer: the count is exact."""
    # Without biases: b2 rides along in the experts' product as further columns, which are no part of the model.
    cfg = tiny_config(**{**DESIGNS[name], "attention_backend": "reference", "add_bias_linear": False})
    assert counted(cfg, 1) == forward_flops_per_token(cfg, seq_length=1)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_sequence(name: str, single_process: None) -> None:
    """The reference computes all S x S scores; the arithmetic counts those in sight, per token mean_keys of them."""
    cfg, length = tiny_config(**{**DESIGNS[name], "attention_backend": "reference", "add_bias_linear": False}), 12
    layers = layer_geometries(cfg)
    all_pairs = sum(layer.flops_per_key for layer in layers) * length
    in_sight = sum(layer.attention_flops(length) for layer in layers)
    assert counted(cfg, length) == pytest.approx((forward_flops_per_token(cfg, length) - in_sight + all_pairs) * length)


FROZEN: dict[str, dict[str, Any]] = {
    "all is trained": DESIGNS["plain SwiGLU, tied"],
    "a layer": {**DESIGNS["plain SwiGLU, tied"], "train_only": '["embedding.*", "decoder.layers.[023].*"]'},
    "the output projection": {"num_experts": None, "train_only": '["embedding.*", "decoder.*"]'},
    "experts of a mixture": {**MIXTURE, "ddim_steps": 8},  # the first of which reads noise alone
}


@pytest.mark.parametrize("name", FROZEN)
def test_weights_that_are_frozen_have_no_gradient(name: str, single_process: None) -> None:
    """Counted backward. One document is short, so that scores, of which all are computed, weigh little."""
    cfg, length = tiny_config(**{**FROZEN[name], "attention_backend": "reference", "add_bias_linear": False}), 4
    model = build_model(cfg).train()
    freeze_parameters(model, cfg)
    layout = SequenceLayout(torch.zeros(1, length, dtype=torch.int32), torch.arange(length)[None])
    loss = model(torch.ones(1, length, dtype=torch.int64), layout).logits().sum()
    counter = FlopCounterMode(display=False, custom_mapping=OURS)
    with counter:
        loss.backward()
    backward = training_flops_per_token(cfg, length) - forward_flops_per_token(cfg, length)
    assert counter.get_total_flops() == pytest.approx(backward * length, rel=0.05)
