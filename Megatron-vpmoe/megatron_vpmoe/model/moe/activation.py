"""What is between an expert's two matrices, in three steps: what is kept, its value, and the gradient.

Shapes: P places of rows, F expert FFN width, A what the first matrix makes (F, or 2 F of a gate over its up
projection).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class SquaredReLU:
    """relu(x)² (So et al. 2021, arXiv 2109.08668); A = F."""

    @staticmethod
    def kept(inner_PA: Tensor) -> Tensor:
        """[P, A]: what the other two steps want of the first matrix's output, which is used up."""
        return inner_PA.relu_()

    @staticmethod
    def value(kept_PA: Tensor) -> Tensor:
        """[P, F]: what goes into the second matrix, before the router's weight; a tensor of its own."""
        return kept_PA.square()

    @staticmethod
    def gradient(grad_PF: Tensor, kept_PA: Tensor, p_P1: Tensor) -> Tensor:
        """[P, A]: of the first matrix's output, from the gradient of p times the value, which is used up."""
        return grad_PF.mul_(kept_PA).mul_(2.0 * p_P1)


class SwiGLU:
    """silu(gate) up (Shazeer 2020, arXiv 2002.05202), the gate's rows first; A = 2 F. Methods as above."""

    @staticmethod
    def kept(inner_PA: Tensor) -> Tensor:
        """The first matrix's output itself."""
        return inner_PA

    @staticmethod
    def value(kept_PA: Tensor) -> Tensor:
        """silu(gate) up."""
        gate_PF, up_PF = kept_PA.chunk(2, dim=-1)
        return functional.silu(gate_PF).mul_(up_PF)

    @staticmethod
    def gradient(grad_PF: Tensor, kept_PA: Tensor, p_P1: Tensor) -> Tensor:
        """The gate's and then the up projection's."""
        gate_PF, up_PF = kept_PA.chunk(2, dim=-1)
        grad_PF = grad_PF.mul_(p_P1)
        grad_gate_PF = torch.ops.aten.silu_backward(grad_PF * up_PF, gate_PF)
        return torch.cat([grad_gate_PF, grad_PF.mul_(functional.silu(gate_PF))], dim=-1)


Activation = type[SquaredReLU] | type[SwiGLU]


def activation_of(gated: bool) -> Activation:
    """Of experts with a gate (``activation: swiglu``) or without."""
    return SwiGLU if gated else SquaredReLU
