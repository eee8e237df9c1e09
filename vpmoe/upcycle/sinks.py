"""Softmax sinks from calibration: each head's takes the same small part of the attention, averaged over a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from vpmoe.weights import Weights
from vpmoe.weights.geometry import process_groups
from vpmoe.weights.streamed_model import streamed_model


def calibrate_sinks(
    cfg: RunConfig, weights: Weights, texts: Sequence[Sequence[int]], mass: float, *, source: str
) -> dict[int, Tensor]:
    """The sinks at which a query gives ``mass`` of its attention to the sink, in the mean over all queries.

    A pass through the layers in order: each layer's sinks are set before its output is computed, so later layers see
    what they will see.

    Args:
        cfg: a geometry with sinks.
        weights: of it, the sinks of any value.
        texts: as tokens.
        mass: between 0 and 1.

    Returns:
        layer (from 1) -> fp32 [heads].
    """
    from megatron_vpmoe.model.attention.masks import left_padded

    sinks: dict[int, Tensor] = {}
    with process_groups(), torch.no_grad():
        model = streamed_model(cfg, weights, source=source)
        layers: Any = model.decoder.layers
        for number, layer in enumerate(layers, 1):

            def enter(attention: Any, arguments: tuple[Any, ...], number: int = number) -> None:
                hidden, layout = arguments[:2]
                lse_BHQ = log_sum_exp(attention, hidden, layout)
                real_BQ = layout.document_id >= 0
                sinks[number] = sink_of_mass(lse_BHQ.transpose(0, 1)[:, real_BQ], mass)
                attention.sink.copy_(sinks[number])

            layer.self_attention.register_forward_pre_hook(enter)
        model(*left_padded(texts, torch.device("cpu")))
    return sinks


def log_sum_exp(attention: Any, hidden_SBH: Tensor, layout: Any) -> Tensor:
    """Of one layer's scaled, biased and masked scores, without its sink: fp32 [B, H, Q]."""
    from megatron_vpmoe.model.attention.grape import alibi_slopes

    query, key, _ = attention.scored_qkv(hidden_SBH, layout)
    query, key = (x.permute(1, 2, 0, 3).float() for x in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    score = query @ key.transpose(-1, -2) * attention.softmax_scale
    queries = query.shape[2]
    if attention.position_embedding == "grape_a":
        score -= alibi_slopes(query.shape[1], score.device)[:, None, None] * layout.distance(queries)
    return score.masked_fill(~layout.visible(queries, attention.window), -torch.inf).logsumexp(-1)


def sink_of_mass(lse_HN: Tensor, mass: float) -> Tensor:
    """fp32 [H]: the s with mean sigmoid(s - lse) = ``mass`` over N, by bisection (the mean rises with s)."""
    wide = lse_HN.double()
    offset = torch.logit(torch.tensor(mass, dtype=torch.float64))
    low, high = wide.amin(1) + offset, wide.amax(1) + offset
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.sigmoid(middle[:, None] - wide).mean(1) < mass
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).float()
