"""The softmax sink: one logit per head that joins the denominator and the row maximum, and has no value.

GPT-OSS's attention sinks. The logit is neither scaled nor biased. Two forms of the same function are used: the
definition (a further column of scores that is dropped after the softmax), and the correction of an attention that
returns its log-sum-exp.

Shapes: B batch, H heads, Q queries, S keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_with_sink(score_BHQS: Tensor, sink_H: Tensor | None) -> Tensor:
    """Attention weights [B, H, Q, S] in the dtype of the scores; with a sink they sum to less than one.

    Args:
        score_BHQS: scaled and biased scores, -inf where masked; at least one finite score in each row.
        sink_H: the sinks, or None for a plain softmax. A sink of -inf is a plain softmax too.
    """
    if sink_H is None:
        return torch.softmax(score_BHQS, dim=-1)
    batch, heads, queries, _ = score_BHQS.shape
    column = sink_H.to(score_BHQS.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
    return torch.softmax(torch.cat([score_BHQS, column], dim=-1), dim=-1)[..., :-1]


def absorb_sink(out_BHQD: Tensor, lse_BHQ: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Carry a sink into an attention computed without one: out · sigmoid(lse - sink).

    Args:
        out_BHQD: the output of the plain softmax.
        lse_BHQ: natural log-sum-exp of its scaled and biased scores, fp32 or wider.
        sink: broadcastable to ``lse_BHQ``.

    Returns:
        the output with the sink in the denominator, and the log-sum-exp that includes the sink.
    """
    weight = torch.sigmoid(lse_BHQ - sink).to(out_BHQD.dtype)
    return out_BHQD * weight.unsqueeze(-1), torch.logaddexp(lse_BHQ, sink)
