"""Kernels that torch has, or compiles, for a GPU alone, as tensors without values see them: shapes, launches, bytes.

Shapes: B batch, H query heads, G KV groups, S sequence, D head dim.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from megatron_vpmoe.planning.counting import Counting

_TILE = 128  # FlexAttention's
_FLEX_BACKWARD = 4  # row sums, the gradients of queries and of keys and values, the sink's


def rms_norm(counting: Counting, x: Tensor, weight: Tensor) -> Tensor:
    """``torch.nn.functional.rms_norm``: CUDA's one kernel, where torch takes the CPU's apart."""
    return _RMSNorm.apply(counting, x, weight)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counting: Counting, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        def run() -> tuple[Tensor, Tensor]:
            return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)

        out, scale = counting.as_one("_fused_rms_norm", 1, run, (x, weight))
        ctx.save_for_backward(x, weight, scale)
        ctx.counting = counting
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors

        def run() -> tuple[Tensor, Tensor]:
            return torch.empty_like(x), torch.empty_like(weight)

        return None, *ctx.counting.as_one("_fused_rms_norm_backward", 2, run, (grad, x, weight, scale))


def install_flex(flex: Any, counting: Counting) -> None:
    """Put a stand-in into ``attention.backends.flex`` for what is compiled; the sink's factor is a second kernel."""
    block_mask = flex.block_mask

    def with_window(layout: Any, window: int | None) -> Any:
        made = block_mask(layout, window)
        made.window = window
        return made

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, _slopes: Any, sink: Any, _scale: float) -> Tensor:
        return _Flex.apply(counting, mask.window, q, k, v, sink)  # type: ignore[no-any-return]

    flex.block_mask, flex._compiled = with_window, lambda: attend


class _Flex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counting, window, q, k, v, sink):  # type: ignore[override]
        def run() -> tuple[Tensor, Tensor]:
            return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)

        out, lse = counting.as_one("flex_attention", 1, run, (q, k, v), _pairs_flops(q, window, products=2))
        if sink is not None:
            out = counting.as_one("flex_sink", 1, lambda: torch.empty_like(q), (out, lse, sink))
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.counting, ctx.window = counting, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, out, lse, sink = ctx.saved_tensors

        def run() -> list[Tensor]:
            return [torch.empty_like(x) for x in (q, k, v, *([] if sink is None else [sink]))]

        flops = _pairs_flops(q, ctx.window, products=5)
        made = ctx.counting.as_one("flex_attention_backward", _FLEX_BACKWARD, run, (grad, q, k, v, out, lse), flops)
        return None, None, *made[:3], None if sink is None else made[3]


def _pairs_flops(q_BHSD: Tensor, window: int | None, *, products: int) -> int:
    """Over the tiles that a row of tiles visits, each row one document: the most that packed rows can take."""
    batch, heads, length, dim = q_BHSD.shape
    tiles = -(-length // _TILE)
    reach = tiles if window is None else 1 + -(-(window - 1) // _TILE)
    visited = sum(min(number + 1, reach) for number in range(tiles))
    return 2 * products * math.prod((batch, heads, visited, _TILE, _TILE, dim))
