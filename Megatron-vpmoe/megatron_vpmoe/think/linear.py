"""Linears without a bias, drawn as the configuration says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Linear

from megatron_vpmoe.model.transformer_config import VPTransformerConfig


def linear(inputs: int, outputs: int, config: VPTransformerConfig, draw: Callable[[Tensor], object] | None) -> Linear:
    """A weight [outputs, inputs] in ``config.params_dtype``, drawn by ``draw``; None: of zeros."""
    layer = Linear(inputs, outputs, bias=False, dtype=config.params_dtype)
    with torch.no_grad():
        if draw is None:
            layer.weight.zero_()
        elif config.perform_initialization:
            draw(layer.weight)
    return layer
