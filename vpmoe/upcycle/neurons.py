"""Where the calibrated feed-forward starts: which SwiGLU neurons become squared-ReLU ones, and how.

Shapes: N tokens, C hidden, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import silu


def contributions(first: Tensor, second: Tensor, inputs: Iterable[Tensor]) -> Tensor:
    """fp64 [F]: the power that each SwiGLU neuron adds to the output, the sum over tokens of |silu(g) u v|².

    Args:
        first: gate over up projection [2 F, C].
        second: [C, F].
        inputs: normed hidden states [N, C], batch by batch.
    """
    power = torch.zeros(second.shape[1], dtype=torch.float64)
    for x in inputs:
        gate, up = (x @ first.t()).chunk(2, -1)
        power += (silu(gate) * up).double().square().sum(0)
    return power * second.double().square().sum(0)


def squared_relu_neurons(first: Tensor, second: Tensor, power: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The strongest neurons as squared-ReLU ones: first matrix [width, C], second [C, width].

    Two for each of width / 2: relu((g + u) / 2)² - relu((g - u) / 2)² is relu(g) u wherever |u| <= |g|; of an odd width
    the last has one.

    Args:
        first: gate over up projection [2 F, C].
        second: [C, F].
        power: of each neuron [F].
        width: squared-ReLU neurons.
    """
    kept = power.topk(-(-width // 2)).indices.sort().values
    gate, up = (half[kept] for half in first.chunk(2))
    first, second = torch.cat([gate + up, gate - up]) / 2, torch.cat([second[:, kept], -second[:, kept]], 1)
    return first[:width], second[:, :width]
