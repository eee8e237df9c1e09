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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.attention.masks import SequenceLayout


def rope_frequencies(head_dim: int, base: float) -> Tensor:
    """fp32 [F], radians per token: base^(-2j/D) for j = 0 .. F-1 (RoFormer, arXiv 2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (base**-exponent).float()


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
        return rotation_angles(layout.position, rope_frequencies(head_dim, base).to(layout.position.device))

    return layout.shared(("rope", head_dim, base), angles)


def rotate(x_SBHD: Tensor, angle_SB1F: Tensor) -> Tensor:
    """Rotate each pair (x_j, x_{j+F}) by its angle; same shape and dtype as x, differentiable in both arguments.

    The pairing and the sign are RoPE's in Megatron-Core and in HF (halves, not neighbours):
    (a, b) -> (a cos - b sin, b cos + a sin).
    """
    return _Rotation.apply(x_SBHD, angle_SB1F, torch.cos(angle_SB1F), torch.sin(angle_SB1F))


class _Rotation(torch.autograd.Function):
    """The rotation with its derivative by hand: half the passes over memory that autograd would take.

    The angle's gradient needs only the output: d(a', b')/dθ = (-b', a').
    """

    @staticmethod
    def forward(ctx, x, angle, cos, sin):  # type: ignore[override]
        out = _turn(x, cos, sin)
        ctx.save_for_backward(out, cos, sin)
        ctx.angle_shape = angle.shape
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        out, cos, sin = ctx.saved_tensors
        grad_angle = None
        if ctx.needs_input_grad[1]:
            (first, second), (grad_first, grad_second) = out.chunk(2, -1), grad.to(out.dtype).chunk(2, -1)
            grad_angle = (grad_second * first).sub_(grad_first * second).sum_to_size(ctx.angle_shape)
        return _turn(grad, cos, -sin).to(grad.dtype), grad_angle, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, cos.dtype)
    x, cos, sin = x.to(wide), cos.to(wide), sin.to(wide)
    if torch.compiler.is_compiling():  # which writes no pass of its own for any of these
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    out = torch.empty_like(x)
    (first, second), (out_first, out_second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
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
