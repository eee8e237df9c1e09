"""Dense attention, written to be obviously correct. O(Q · K) memory per head.

Shapes: B batch, H query heads, G KV groups, Q queries, K keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.attention.sink import softmax_with_sink


def reference_attention(
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    layout: SequenceLayout,
    window: int | None,
    alibi_slopes_H: Tensor | None,
    sink_H: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """As `backends.core_attention`; everything between input and output is fp32 or wider."""
    heads, queries = q_BHQD.shape[1:3]
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BHQD, k_BGKD, v_BGKD))
    per_group = heads // k.shape[1]
    k, v = k.repeat_interleave(per_group, dim=1), v.repeat_interleave(per_group, dim=1)

    score_BHQK = (q @ k.transpose(-1, -2)) * softmax_scale
    if alibi_slopes_H is not None:
        score_BHQK = score_BHQK - alibi_slopes_H.to(wide)[:, None, None] * layout.distance(queries)
    score_BHQK = score_BHQK.masked_fill(~layout.visible(queries, window), -torch.inf)
    return (softmax_with_sink(score_BHQK, sink_H) @ v).to(q_BHQD.dtype)
