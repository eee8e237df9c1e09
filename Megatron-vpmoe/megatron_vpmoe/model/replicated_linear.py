"""A linear layer whose weight every tensor-parallel rank holds whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional
from torch.nn.parameter import Parameter

from megatron_vpmoe.model.transformer_config import VPTransformerConfig


class ReplicatedLinear(MegatronModule):
    """x Wᵀ, without a bias; equal on every tensor-parallel rank as long as its output's gradient is.

    Under sequence parallelism x holds this rank's part of the sequence, and ``weight.sequence_parallel`` has
    Megatron-Core sum the weight's gradient over the ranks.

    Args:
        config: of the model.
        inputs: I, the last dimension of x.
        outputs: O, the rows of the weight.
        init_method: fills the fp32 weight [O, I].
    """

    def __init__(
        self, config: VPTransformerConfig, inputs: int, outputs: int, *, init_method: Callable[[Tensor], Any]
    ) -> None:
        super().__init__(config)
        weight = torch.empty(outputs, inputs, dtype=torch.float32)
        if config.perform_initialization:
            init_method(weight)
        self.weight = Parameter(weight.to(config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return functional.linear(x, self.weight)
