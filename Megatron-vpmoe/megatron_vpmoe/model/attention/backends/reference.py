"""Dense attention, written to be obviously correct. O(S²) memory per head.

Shapes: B batch, H query heads, G KV groups, S sequence, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.attention.sink import softmax_with_sink


def reference_attention(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    layout: SequenceLayout,
    window: int | None,
    alibi_slopes_H: Tensor | None,
    sink_H: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """As `backends.core_attention`; everything between input and output is fp32 or wider."""
    weight_BHSS = attention_weights(q_BHSD, k_BGSD, layout, window, alibi_slopes_H, sink_H, softmax_scale)
    v = v_BGSD.to(weight_BHSS.dtype).repeat_interleave(q_BHSD.shape[1] // v_BGSD.shape[1], dim=1)
    return (weight_BHSS @ v).to(q_BHSD.dtype)


def attention_weights(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    layout: SequenceLayout,
    window: int | None,
    alibi_slopes_H: Tensor | None,
    sink_H: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """What each query takes of each key, fp32 or wider [B, H, S, S]; with a sink a row sums to less than one."""
    wide = torch.promote_types(q_BHSD.dtype, torch.float32)
    q, k = q_BHSD.to(wide), k_BGSD.to(wide)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    score_BHSS = (q @ k.transpose(-1, -2)) * softmax_scale
    if alibi_slopes_H is not None:
        score_BHSS = score_BHSS - alibi_slopes_H.to(wide)[:, None, None] * layout.distance()
    score_BHSS = score_BHSS.masked_fill(~layout.visible(window), -torch.inf)
    return softmax_with_sink(score_BHSS, sink_H)
