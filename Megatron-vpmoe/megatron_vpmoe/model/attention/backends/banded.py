"""Local attention on any device: each block of W queries against its own W keys and the W before it.

A window of W (the query included) never reaches past the block before, so the scores outside these S/W tiles of
W × 2W need not exist. The heads of a KV group stand below each other as further queries of the same tile: keys and
values are not repeated, and the matrix products are larger. On the CPU tiles go through torch's fused kernel, some at a
time; on other devices, where that does not exist, through matrix products and a softmax in fp32.

Shapes: B batch, H query heads, G KV groups, P = H / G heads a group, S sequence, D head dim, W window, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.attention.backends.sdpa import fused_backward, fused_forward
from megatron_vpmoe.model.attention.masks import SequenceLayout, additive
from megatron_vpmoe.model.attention.sink import absorb_sink, softmax_with_sink

# Query bytes that go through the kernel at one time, for each thread: bounds the copies in tile order.
_BYTES_A_THREAD = 2**20


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
    length, per_group = q_BHSD.shape[2], q_BHSD.shape[1] // k_BGSD.shape[1]
    if filler := -length % window:
        q_BHSD, k_BGSD, v_BGSD = (torch.nn.functional.pad(x, (0, 0, 0, filler)) for x in (q_BHSD, k_BGSD, v_BGSD))
    dtype = torch.promote_types(q_BHSD.dtype, torch.float32)
    bias = layout.shared(
        ("banded", window, per_group, dtype),
        lambda: additive(layout.blocks_visible(window)).to(dtype).repeat(1, 1, per_group, 1).unsqueeze(2),
    )
    attend = _FusedTiles.apply if q_BHSD.is_cpu else _by_definition
    return attend(q_BHSD, k_BGSD, v_BGSD, bias, sink_H, softmax_scale, window)[:, :, :length]


def _by_definition(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    bias: Tensor,
    sink_H: Tensor | None,
    softmax_scale: float,
    window: int,
) -> Tensor:
    """All tiles at once, differentiated by autograd; ``bias`` [B, N, 1, P·W, 2W]."""
    groups = k_BGSD.shape[1]
    q, k, v = _queries(q_BHSD, groups, window), *(_keys(_preceded(x, window), window) for x in (k_BGSD, v_BGSD))
    score = q.to(bias.dtype) @ k.to(bias.dtype).transpose(-1, -2) * softmax_scale + bias.flatten(0, 1)
    of_heads = score.unflatten(2, (-1, window)).flatten(1, 2)  # [B·N, H, W, 2W]
    weight = softmax_with_sink(of_heads, sink_H).reshape(score.shape)
    out = (weight @ v.to(bias.dtype)).to(q_BHSD.dtype)
    out = out.view(len(q_BHSD), -1, groups, q_BHSD.shape[1] // groups, window, out.shape[-1])
    return out.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)


class _FusedTiles(torch.autograd.Function):
    """A chunk of tiles at a time through the fused kernel of `sdpa`.

    Queries, keys and values are kept as they came and put in tile order again in the backward pass: the copies are
    cheap and twice their size. The output lies in memory as [S, B, H, D], as the layer's next step reads it.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, sink, softmax_scale, window):  # type: ignore[override]
        groups, chunks = k.shape[1], _chunks(q, window)
        out = q.new_empty(q.shape[2], q.shape[0], q.shape[1], q.shape[3]).permute(1, 2, 0, 3)
        before = [_preceded(x, window) for x in (k, v)]
        statistics = []
        for rows, seen, blocks in chunks:
            keys, values = (_keys(x[:, :, seen], window) for x in before)
            chunk = _queries(q[:, :, rows], groups, window), keys, values
            tiles, lse = fused_forward(*chunk, bias[:, blocks].flatten(0, 1), softmax_scale, causal=False)
            if sink is not None:
                tiles, lse = absorb_sink(tiles, lse, _of_rows(sink, groups, window).to(lse.dtype))
            target = _tile_order(out[:, :, rows], groups, window)
            target.copy_(tiles.view(target.shape))
            statistics.append(lse)
        ctx.save_for_backward(q, k, v, bias, sink, out, *statistics)
        ctx.softmax_scale, ctx.window, ctx.chunks = softmax_scale, window, chunks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, bias, sink, out, *statistics = ctx.saved_tensors
        groups, window = k.shape[1], ctx.window
        before = [_preceded(x, window) for x in (k, v)]
        grad_q = torch.empty_like(q)
        grad_before = [x.new_zeros(x.shape) for x in before]
        grad_sink = None if sink is None else torch.zeros_like(sink, dtype=bias.dtype)
        for (rows, seen, blocks), lse in zip(ctx.chunks, statistics, strict=True):
            keys, values = (_keys(x[:, :, seen], window) for x in before)
            tile_grad, tile_q, tile_out = (_queries(x[:, :, rows], groups, window) for x in (grad, q, out))
            if sink is not None and grad_sink is not None:
                row_sum = (tile_grad * tile_out).sum(-1, dtype=lse.dtype)
                through_sink = torch.exp(_of_rows(sink, groups, window).to(lse.dtype) - lse) * row_sum
                grad_sink -= through_sink.unflatten(2, (-1, window)).sum((0, 3)).flatten()
            tile_mask = bias[:, blocks].flatten(0, 1)
            grads = fused_backward(
                tile_grad, tile_q, keys, values, tile_out, lse, tile_mask, ctx.softmax_scale, causal=False
            )
            target = _tile_order(grad_q[:, :, rows], groups, window)
            target.copy_(grads[0].view(target.shape))
            for total, part in zip(grad_before, grads[1:], strict=True):
                _add_tiles(total[:, :, seen], part, window)
        grad_k, grad_v = (x[:, :, window:] for x in grad_before)
        grad_sink = None if sink is None or grad_sink is None else grad_sink.to(sink.dtype)
        return grad_q, grad_k, grad_v, None, grad_sink, None, None


def _chunks(q_BHSD: Tensor, window: int) -> list[tuple[slice, slice, slice]]:
    """Runs of blocks: their rows, the rows of keys preceded by a block that they see, and their numbers."""
    batch, heads, length, dim = q_BHSD.shape
    block_bytes = batch * heads * window * dim * q_BHSD.element_size()
    size = max(1, torch.get_num_threads() * _BYTES_A_THREAD // block_bytes)
    runs = ((first, min(first + size, length // window)) for first in range(0, length // window, size))
    return [
        (slice(first * window, last * window), slice(first * window, (last + 1) * window), slice(first, last))
        for first, last in runs
    ]


def _tile_order(x_BHSD: Tensor, groups: int, window: int) -> Tensor:
    """[B, N, G, P, W, D], a view."""
    return x_BHSD.unflatten(2, (-1, window)).unflatten(1, (groups, -1)).permute(0, 3, 1, 2, 4, 5)


def _queries(x_BHSD: Tensor, groups: int, window: int) -> Tensor:
    """[B·N, G, P·W, D]: the heads of a group below each other."""
    return _tile_order(x_BHSD, groups, window).flatten(3, 4).flatten(0, 1)


def _preceded(x_BGSD: Tensor, window: int) -> Tensor:
    """[B, G, W + S, D]: a block of zeros, which no query sees, before the first."""
    return torch.nn.functional.pad(x_BGSD, (0, 0, window, 0))


def _keys(x_BGSD: Tensor, window: int) -> Tensor:
    """[B·N, G, 2W, D] of N + 1 blocks: each but the first after the one before it; overlapping views where B = 1."""
    return x_BGSD.unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _add_tiles(total_BGSD: Tensor, tiles: Tensor, window: int) -> None:
    """Add gradients [B·N, G, 2W, D] of what `_keys` returned to those of what it was given."""
    before, own = tiles.unflatten(0, (len(total_BGSD), -1)).transpose(1, 2).split(window, dim=3)  # [B, G, N, W, D]
    blocks = total_BGSD.unflatten(2, (-1, window))
    blocks[:, :, :-1] += before
    blocks[:, :, 1:] += own


def _of_rows(sink_H: Tensor, groups: int, window: int) -> Tensor:
    """[1, G, P·W]: each row of a tile with the sink of its head."""
    return sink_H.view(1, groups, -1, 1).expand(-1, -1, -1, window).flatten(2)
