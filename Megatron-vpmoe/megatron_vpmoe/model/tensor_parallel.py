"""Tensor parallelism where upstream has no part for it: a weight that every rank holds whole, whole sequences, and
linears that are alone.

Under sequence parallelism each tensor-parallel rank keeps its part of the sequence between attention and feed-forward.
Where the parts begin and end is Megatron-Core's: the embedding scatters the sequence, column-parallel linears gather
it, row-parallel ones scatter their sums. A step of a single token cannot be split, so decoding switches it off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional
from torch.nn.parameter import Parameter

from megatron_vpmoe.model.transformer_config import VPTransformerConfig

_FLAGS = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")


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


class _Alone:
    """Upstream's linear, which on one tensor-parallel rank has nobody to talk to: there x Wᵀ + b in one product."""

    tp_group: Any
    weight: Parameter
    bias: Parameter | None

    def forward(self, input_: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        """[..., I] -> [..., O], and the bias if it is still to be added."""
        if self.tp_group.size() > 1:
            return super().forward(input_, *arguments, **keywords)  # type: ignore[misc]
        return functional.linear(input_, self.weight, self.bias), None


class ColumnLinear(_Alone, ColumnParallelLinear):
    """Ranks have rows of the weight."""


class RowLinear(_Alone, RowParallelLinear):
    """Ranks have columns of the weight, and their outputs are summed."""


@contextlib.contextmanager
def whole_sequences(model: MegatronModule) -> Iterator[None]:
    """Every rank holds every position until the end of the block; for forward passes without a gradient."""
    if not model.config.sequence_parallel:
        yield
        return
    switched = [(owner, flag) for owner in model.modules() for flag in _FLAGS if getattr(owner, flag, None) is True]
    _set([*switched, (model.config, "sequence_parallel")], False)
    try:
        yield
    finally:
        _set([*switched, (model.config, "sequence_parallel")], True)


def _set(places: list[tuple[object, str]], value: bool) -> None:
    for owner, flag in places:
        setattr(owner, flag, value)
