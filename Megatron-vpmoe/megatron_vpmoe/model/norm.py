"""RMSNorm with fp32 statistics, and a CPU backward pass that is more than twice as fast as torch's composite one.

Shapes: D the normalised last dimension, anything in front of it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_vpmoe.model.transformer_config import VPTransformerConfig


class _RMSNormOnCPU(Function):
    """y = w x / rms(x). torch has no fused kernel for it on CPU; this is the same arithmetic in fewer passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        normed = wide * scale
        ctx.save_for_backward(normed, scale, weight)
        ctx.dtype = x.dtype
        return (normed * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normed, scale, weight = ctx.saved_tensors
        width = normed.shape[-1]
        wide = grad.float()
        product = (wide * normed).reshape(-1, width)
        along_x = torch.mv(product, weight.float()).view(scale.shape).div_(width)
        grad_x = torch.mul(wide, weight).addcmul_(normed, along_x, value=-1.0).mul_(scale)
        return grad_x.to(ctx.dtype), product.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x²) + eps) over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        x: [..., D], any floating dtype; statistics are fp32.
        weight: [D].

    Returns:
        [..., D] in the dtype of x.
    """
    if x.device.type == "cpu" and x.dtype != torch.float64:
        return _RMSNormOnCPU.apply(x, weight, eps)  # type: ignore[return-value]
    return functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


class RMSNorm(MegatronModule):
    """The one norm of the model; built by ModuleSpec as ``norm(config=, hidden_size=, eps=)``."""

    def __init__(self, config: VPTransformerConfig, hidden_size: int, eps: float = 1e-6, **_upstream: Any) -> None:
        super().__init__(config)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        # Each rank norms its part of the sequence only: Megatron-Core sums the gradient over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps)
