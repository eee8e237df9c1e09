"""Torch's fused CPU attention with a sink, and the dense backend made of it.

The kernel computes out = P v and lse, the log-sum-exp of the scores, without storing P; its backward recomputes
P = exp(score - lse) and needs rowsum(grad · out). With a sink, the true weights are P' = exp(score - lse') where lse'
includes the sink, and the softmax's backward keeps its form: dscore = P' (dP' - rowsum(grad · out')). So handing the
kernel's backward out' and lse' in place of out and lse gives the gradients of q, k and v with the sink, exactly; no
gradient has to pass through lse. The sink's own is -p_sink · rowsum(grad · out'), p_sink = exp(sink - lse').

Shapes: B batch, H query heads, G KV groups, Q queries, K keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.attention.masks import SequenceLayout, additive
from megatron_vpmoe.model.attention.sink import absorb_sink

# Private operators of the pinned torch; a test holds their result to the reference backend.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def fused_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, softmax_scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """The kernel: output [B, H, Q, D] without a sink and log-sum-exp [B, H, Q].

    ``bias`` fp32 (fp64 for fp64 inputs), broadcastable to [B, H, Q, K], with a finite entry in each row; ``causal``
    additionally masks keys after the query's row and skips their work (Q = K).
    """
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    return _forward(q, k, v, 0.0, causal, attn_mask=bias, scale=softmax_scale)


def fused_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
    softmax_scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; with ``out`` and ``lse`` that include a sink, those with the sink."""
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    return _backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=softmax_scale)


def _dense_rows(x: Tensor) -> Tensor:
    # The kernel reads heads as if their elements lay side by side, and says nothing where they do not.
    return x if x.stride(-1) == 1 else x.contiguous()


class FusedSinkAttention(torch.autograd.Function):
    """Attention of [B, H, Q, D] queries to [B, H, K, D] keys and values under an additive mask, with an optional sink.

    ``apply(q, k, v, bias, sink, softmax_scale, causal)``, as `fused_forward`; ``sink`` broadcastable to [B, H, Q], or
    None. The bias has no gradient.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, sink, softmax_scale, causal):  # type: ignore[override]
        out, lse = fused_forward(q, k, v, bias, softmax_scale, causal=causal)
        if sink is not None:
            out, lse = absorb_sink(out, lse, sink.to(lse.dtype))
        ctx.save_for_backward(q, k, v, bias, sink, out, lse)
        ctx.softmax_scale, ctx.causal = softmax_scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, bias, sink, out, lse = ctx.saved_tensors
        dsink = None
        if sink is not None and ctx.needs_input_grad[4]:
            row_sum = (grad * out).sum(-1, dtype=lse.dtype)
            dsink = -(torch.exp(sink.to(lse.dtype) - lse) * row_sum).sum_to_size(sink.shape).to(sink.dtype)
        grads = fused_backward(grad, q, k, v, out, lse, bias, ctx.softmax_scale, causal=ctx.causal)
        return *grads, None, dsink, None, None


def sdpa_attention(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    layout: SequenceLayout,
    window: int | None,
    alibi_slopes_H: Tensor | None,
    sink_H: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """As `backends.core_attention`. The mask is O(H · S²), once a pass; scores are not."""
    per_group = q_BHSD.shape[1] // k_BGSD.shape[1]
    k, v = k_BGSD.repeat_interleave(per_group, dim=1), v_BGSD.repeat_interleave(per_group, dim=1)
    bias = _bias(layout, window, alibi_slopes_H, torch.promote_types(q_BHSD.dtype, torch.float32))
    sink = None if sink_H is None else sink_H.view(1, -1, 1)
    return FusedSinkAttention.apply(q_BHSD, k, v, bias, sink, softmax_scale, True)


def _bias(layout: SequenceLayout, window: int | None, slopes_H: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, 1 or H, S, S]: the mask and the distance bias in one tensor, kept with the layout."""

    def make() -> tuple[Tensor, Tensor | None]:
        visible = layout.visible(window)
        if slopes_H is None:
            return additive(visible).to(dtype), None
        # Infinitely far where masked: one product gives bias and mask, and only the result has a head dimension.
        distance = torch.where(visible, layout.distance().to(dtype), torch.inf)
        return distance * -slopes_H.to(dtype)[:, None, None], slopes_H

    # The slopes are stored along, so that their id cannot be given to another tensor while the entry lives.
    return layout.shared(("bias", window, None if slopes_H is None else id(slopes_H), dtype), make)[0]
