"""The value residual: every layer mixes in the values of layer 1 (ResFormer, arXiv 2410.17897)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def mix_first_value(value_SBGD: Tensor, first_value_SBGD: Tensor, scale: Tensor) -> Tensor:
    """λ · v + (1 - λ) · v_1, in the dtype of v; computed in fp32 or wider, since a bf16 λ cannot move away from 1.

    Args:
        value_SBGD: this layer's values [sequence, batch, KV group, head dim].
        first_value_SBGD: layer 1's values before any mixing, same shape.
        scale: λ, a scalar; 1.0 is exactly the identity for finite v_1.
    """
    return _Mix.apply(value_SBGD, first_value_SBGD, scale)  # type: ignore[no-any-return]


class _Mix(Function):
    """The mix in two passes, each rounded once, where autograd's steps are four."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, first: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(value, first, scale)
        wide = _wide(scale, value.dtype)
        mixed = torch.addcmul(first, first, wide, value=-1)  # exactly 0 where λ is 1
        return torch.addcmul(mixed, value, wide, out=mixed if mixed.dtype == value.dtype else torch.empty_like(value))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        value, first, scale = ctx.saved_tensors
        wide = _wide(scale, value.dtype)
        grad_value = torch.mul(grad, wide, out=torch.empty_like(value))
        grad_first = torch.addcmul(grad, grad, wide, value=-1, out=torch.empty_like(first))
        along = torch.addcmul(grad.to(wide.dtype) * value, grad, first.to(wide.dtype), value=-1)
        return grad_value, grad_first, along.sum().to(scale.dtype)


def _wide(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """With a dimension, so that it decides the dtype of what it is multiplied with."""
    return scale.to(torch.promote_types(dtype, scale.dtype)).view(1)
