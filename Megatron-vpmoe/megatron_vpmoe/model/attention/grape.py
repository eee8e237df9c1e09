"""Positions: GRAPE-M (rotation by learned frequencies), RoPE, and GRAPE-A (an additive bias on distance).

GRAPE is arXiv 2512.07805. Its multiplicative form rotates pairs of coordinates by an angle proportional to the
position, as RoPE does, but learns the frequencies; its additive form has ALiBi's slopes (arXiv 2108.12409) as a special
case. Angles, cosines and sines are fp32 or wider whatever the precision of the model: at position 2000 a bf16 angle is
off by whole turns.

Shapes: S sequence, B batch, H heads, D head dim, F = D / 2 frequencies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.attention.masks import SequenceLayout


@functools.lru_cache
def rope_frequencies(head_dim: int, base: float, device: torch.device) -> Tensor:
    """fp32 [F], radians per token: base^(-2j/D) for j = 0 .. F-1 (RoFormer, arXiv 2104.09864).

    Computed by the host whatever the device, and sent there once: a GPU would be waited for.
    """
    # The first caller may be a sampler in inference mode; the tensor must serve training as well.
    with torch.inference_mode(False):
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
        return (base**-exponent).float().to(device)


def initial_log_frequencies(head_dim: int, base: float, scale: float) -> Tensor:
    """fp32 [F]: the λ at which GRAPE-M equals RoPE, λ_j = scale · ln(base^(-2j/D))."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (exponent * (-scale * math.log(base))).float()


def rotation_angles(position_BS: Tensor, frequency_F: Tensor) -> Tensor:
    """Angles t · f in radians, [S, B, 1, F] in the dtype of the frequencies (fp32 or wider)."""
    return position_BS.t().to(frequency_F.dtype)[:, :, None, None] * frequency_F


def rope_angles(layout: SequenceLayout, head_dim: int, base: float) -> Tensor:
    """RoPE's angles of a layout's positions [S, B, 1, F], made once for all its layers."""

    def angles() -> Tensor:
        return rotation_angles(layout.position, rope_frequencies(head_dim, base, layout.position.device))

    return layout.shared(("rope", head_dim, base), angles)


def rotate(x_SBHD: Tensor, angle_SB1F: Tensor) -> Tensor:
    """Rotate each pair (x_j, x_{j+F}) by its angle; same shape and dtype as x, differentiable in both arguments.

    The pairing and the sign are RoPE's in Megatron-Core and in HF (halves, not neighbours):
    (a, b) -> (a cos - b sin, b cos + a sin).
    """
    return rotate_all([x_SBHD], angle_SB1F)[0]


def rotate_all(xs_SBHD: Sequence[Tensor], angle_SB1F: Tensor) -> tuple[Tensor, ...]:
    """``rotate`` of several tensors, of any numbers of heads, by the same angles."""
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():  # where torch calls a forward of varargs wrongly
        cos, sin = torch.cos(angle_SB1F), torch.sin(angle_SB1F)
        return tuple(_turn(x, cos, sin, x.dtype) for x in xs_SBHD)
    return _Rotation.apply(angle_SB1F, *xs_SBHD)  # type: ignore[no-any-return]


class _Rotation(torch.autograd.Function):
    """The rotation with its derivative by hand: half the passes over memory that autograd would take.

    With d(a', b')/dθ = (-b', a') and the gradient (da, db) of (a, b), the angle's is a db - b da: no output is kept.
    """

    @staticmethod
    def forward(ctx, angle, *xs):  # type: ignore[override]
        cos, sin = torch.cos(angle), torch.sin(angle)
        ctx.save_for_backward(cos, sin, *xs)
        return tuple(_turn(x, cos, sin, x.dtype) for x in xs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[override]
        cos, sin, *xs = ctx.saved_tensors
        grad_angle, turned = None, []
        for x, grad in zip(xs, grads, strict=True):
            back = _turn(grad, cos, sin, torch.promote_types(x.dtype, cos.dtype), sign=-1)
            if ctx.needs_input_grad[0]:
                (first, second), (grad_first, grad_second) = x.chunk(2, -1), back.chunk(2, -1)
                part = (grad_second * first).addcmul_(grad_first, second, value=-1).sum_to_size(cos.shape)
                grad_angle = part if grad_angle is None else grad_angle + part
            turned.append(back.to(x.dtype))
        return grad_angle, *turned


def _turn(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, *, sign: int = 1) -> Tensor:
    """By the angle, or with ``sign`` -1 back; computed in the wider of both dtypes, written in ``dtype``."""
    if torch.compiler.is_compiling():  # which writes no pass of its own for any of these
        first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
        sin = sin if sign == 1 else -sin
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    (first, second), (out_first, out_second) = x.chunk(2, -1), out.chunk(2, -1)
    halves, cos = x.unflatten(-1, (2, -1)), cos.unsqueeze(-2)
    is_wide = dtype == torch.promote_types(x.dtype, cos.dtype)
    product = torch.mul(halves, cos, out=out.view(halves.shape)) if is_wide else halves * cos
    torch.addcmul(product[..., 0, :], second, sin, value=-sign, out=out_first)
    torch.addcmul(product[..., 1, :], first, sin, value=sign, out=out_second)
    return out


@functools.lru_cache
def alibi_slopes(num_heads: int, device: torch.device, part: int = 0, parts: int = 1) -> Tensor:
    """fp32 [H / parts]: m_h = 2^(-8(h+1)/H); where H is no power of two, ALiBi's interleave.

    The interleave takes the slopes of the largest power of two P below H, then every other slope of 2P.
    One tensor per set of arguments, so that layers can share what is computed from it.

    Args:
        num_heads: H, of the whole layer.
        device: of the result.
        part: which of ``parts`` equal runs of heads; a tensor-parallel rank has one of them.
        parts: divides H.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-8.0 * (2 * h + 1) / (2 * power)) for h in range(num_heads - power)]
    count = num_heads // parts
    # The first caller may be a sampler in inference mode; the tensor must serve training as well.
    with torch.inference_mode(False):
        return torch.tensor(slopes[part * count : (part + 1) * count], dtype=torch.float32, device=device)
