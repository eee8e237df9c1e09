"""The calibrated feed-forward's start: which neurons, and what they become."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from vpmoe.upcycle.calibrated_layers import contributions, squared_relu_neurons

HIDDEN, NEURONS, TOKENS = 6, 12, 200


def _random() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2 * NEURONS, HIDDEN, generator=generator)
    return first, torch.randn(HIDDEN, NEURONS, generator=generator), torch.randn(TOKENS, HIDDEN, generator=generator)


def test_a_neuron_counts_as_much_as_it_adds() -> None:
    first, second, x = _random()
    gate, up = (x @ first.t()).chunk(2, -1)
    alone = [(silu(gate[:, i]) * up[:, i])[:, None] * second[:, i] for i in range(NEURONS)]
    expected = torch.stack([out.double().square().sum() for out in alone])
    torch.testing.assert_close(contributions(first, second, x.split(70)), expected, rtol=1e-5, atol=1e-5)


def test_a_pair_is_the_product_behind_a_relu_where_the_gate_is_larger() -> None:
    first, second, x = _random()
    power = contributions(first, second, [x])
    matrices = squared_relu_neurons(first, second, power, 2 * NEURONS)
    assert [tuple(matrix.shape) for matrix in matrices] == [(2 * NEURONS, HIDDEN), (HIDDEN, 2 * NEURONS)]
    gate, up = (x @ first.t()).chunk(2, -1)
    square = (x @ matrices[0].t()).relu().square()
    product = square[:, :NEURONS] - square[:, NEURONS:]
    inside = up.abs() <= gate.abs()
    assert 0.3 < inside.float().mean() < 0.7
    torch.testing.assert_close(product[inside], (gate.relu() * up)[inside], rtol=1e-4, atol=1e-4)
    odd = squared_relu_neurons(first, second, power, 7)
    strongest = power.topk(4).indices.sort().values
    torch.testing.assert_close(odd[0][:4], (first[:NEURONS] + first[NEURONS:])[strongest] / 2)
    assert [tuple(matrix.shape) for matrix in odd] == [(7, HIDDEN), (HIDDEN, 7)]
