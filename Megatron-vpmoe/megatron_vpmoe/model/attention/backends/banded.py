"""Local attention on the CPU: each block of W queries against its own W keys and the W before it.

A window of W (the query included) never reaches past the block before, so the scores outside these S/W tiles of
W × 2W need not exist. The heads of a KV group stand below each other as further queries of the same tile: keys and
values are not repeated, and the matrix products are larger.

Shapes: B batch, H query heads, G KV groups, P = H / G heads a group, S sequence, D head dim, W window, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.attention.backends.sdpa import FusedSinkAttention
from megatron_vpmoe.model.attention.masks import SequenceLayout, additive


def banded_attention(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    layout: SequenceLayout,
    window: int,
    sink_H: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """As `backends.core_attention` with a window, no bias on distance and as many queries as keys."""
    batch, heads, length, dim = q_BHSD.shape
    groups = k_BGSD.shape[1]
    per_group, filler = heads // groups, -length % window
    if filler:
        q_BHSD, k_BGSD, v_BGSD = (torch.nn.functional.pad(x, (0, 0, 0, filler)) for x in (q_BHSD, k_BGSD, v_BGSD))
    blocks = (length + filler) // window

    q = q_BHSD.reshape(batch, groups, per_group, blocks, window, dim).permute(0, 3, 1, 2, 4, 5)
    q = q.reshape(batch * blocks, groups, per_group * window, dim)
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = layout.shared(
        ("banded", window, per_group, dtype),
        lambda: additive(layout.blocks_visible(window)).to(dtype).flatten(0, 1).repeat(1, per_group, 1).unsqueeze(1),
    )
    sink = None
    if sink_H is not None:
        sink = sink_H.view(1, groups, per_group, 1).expand(-1, -1, -1, window).reshape(1, groups, -1)

    out = FusedSinkAttention.apply(
        q,
        _WithBlockBefore.apply(k_BGSD, window),
        _WithBlockBefore.apply(v_BGSD, window),
        bias,
        sink,
        softmax_scale,
        False,
    )
    out = out.reshape(batch, blocks, groups, per_group, window, dim).permute(0, 2, 3, 1, 4, 5)
    return out.reshape(batch, heads, blocks * window, dim)[:, :, :length]


class _WithBlockBefore(torch.autograd.Function):
    """[B, G, S, D] -> [B·N, G, 2W, D]: every block of W rows with the block before it (zeros before the first).

    By hand, since autograd would fill and add whole tensors for the overlap.
    """

    @staticmethod
    def forward(ctx, x, window):  # type: ignore[override]
        ctx.window = window
        x = x.unflatten(2, (-1, window)).transpose(1, 2)
        batch, blocks, groups, _, dim = x.shape
        out = x.new_empty(batch, blocks, groups, 2 * window, dim)
        out[:, :, :, window:] = x
        out[:, 1:, :, :window] = x[:, :-1]
        out[:, 0, :, :window] = 0
        ctx.batch = batch
        return out.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        grad = grad.unflatten(0, (ctx.batch, -1))
        before, own = grad.split(ctx.window, dim=3)
        total = own.transpose(1, 2).contiguous()
        total[:, :, :-1] += before[:, 1:].transpose(1, 2)
        return total.flatten(2, 3), None
