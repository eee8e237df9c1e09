"""The router hangs on the document so far and on nothing else, and decodes from a sum."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vpmoe.think.router import ExpertRouter, entropy
from ref import latent_attention as reference
from tests.think_parts import (
    Inputs,
    apart,
    check_causality,
    check_decoding,
    check_gradients,
    check_packing,
    drawn,
    packed,
    part_config,
    run,
)

WIDTH, EXPERTS = 32, 3


def router() -> ExpertRouter:
    torch.manual_seed(0)
    return drawn(ExpertRouter(part_config(), experts=EXPERTS), scale=1.0)


def inputs_of(length: int) -> Inputs:
    return {"x_BSH": torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


def test_by_the_definition() -> None:
    part, inputs = router(), inputs_of(5 + 4)
    found = apart(run(part, inputs, packed(5, 4)), [5, 4])
    for given, weights in zip(apart(inputs["x_BSH"], [5, 4]), found, strict=True):
        expected = torch.stack(reference.routed(list(given[0]), part.weight))
        torch.testing.assert_close(weights[0], expected)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_a_packed_row_is_its_documents_alone() -> None:
    check_packing(router(), inputs_of(5 + 7 + 4 + 3), [5, 7, 4])


def test_a_token_changes_nothing_before_it() -> None:
    check_causality(router(), inputs_of(6), 6)


def test_decoding_is_the_whole_pass() -> None:
    check_decoding(router(), inputs_of(9 + 3 + 6), [9, 3, 6], 3, str)


def test_gradients_of_weights_and_of_their_entropy() -> None:
    part, inputs = router(), inputs_of(5)
    weight = torch.randn(1, 5, EXPERTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    check_gradients(part, lambda given: (run(part, given, packed(5)) * weight).sum(), inputs)
    check_gradients(part, lambda given: entropy(run(part, given, packed(5))).sum(), inputs)


def test_weights_are_fp32_of_narrow_states() -> None:
    part = ExpertRouter(part_config(torch.bfloat16), experts=EXPERTS).bfloat16()
    assert part(inputs_of(4)["x_BSH"].bfloat16(), packed(4)).dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "nats"), [([1 / 3] * 3, math.log(3)), ([0.5, 0.5, 0.0], math.log(2)), ([1.0, 0.0, 0.0], 0.0)]
)
def test_entropy(weights: list[float], nats: float) -> None:
    weight = torch.tensor(weights, requires_grad=True)
    found = entropy(weight)
    found.backward()
    assert found.item() == pytest.approx(nats, abs=1e-6)
    assert weight.grad is not None and weight.grad.isfinite().all()
