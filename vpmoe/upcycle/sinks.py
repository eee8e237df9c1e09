"""Softmax sinks from calibration: each head's takes the same small part of the attention, averaged over a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from vpmoe.upcycle.residual_streams import Batch, embedded
from vpmoe.weights import Weights
from vpmoe.weights.geometry import process_groups
from vpmoe.weights.streamed_model import LayerByLayer


def calibrate_sinks(
    cfg: RunConfig,
    weights: Weights,
    batches: Sequence[Batch],
    mass: float,
    *,
    source: str,
    progress: Callable[[str, int], None],
) -> dict[int, Tensor]:
    """The sinks at which a query gives ``mass`` of its attention to the sink, in the mean over all queries.

    All texts go through one layer before they come to the next: its sinks are set before its output is computed, so
    later layers see what they will see. Memory holds a layer and, of every token, the residual stream and the values of
    layer 1.

    Args:
        cfg: a geometry with sinks.
        weights: of it, the sinks of any value.
        batches: of the calibration texts.
        mass: between 0 and 1.
        source: for messages.
        progress: told each layer and its bytes.

    Returns:
        layer (from 1) -> fp32 [heads].
    """
    sinks: dict[int, Tensor] = {}
    with process_groups(), torch.no_grad():
        model = LayerByLayer(cfg, weights, source=source)
        streams = embedded(model, batches)
        values: list[Tensor | None] = [None] * len(batches)
        for index in range(model.count):
            with model.layer(index) as layer:
                found = [
                    log_sum_exp(layer.self_attention, layer.input_layernorm(stream), batch.layout).transpose(0, 1)[
                        :, batch.real_SB.t()
                    ]
                    for stream, batch in zip(streams, batches, strict=True)
                ]
                sinks[index + 1] = sink_of_mass(torch.cat(found, 1), mass)
                layer.self_attention.sink.copy_(sinks[index + 1])
                for number, batch in enumerate(batches):
                    streams[number], values[number] = layer(streams[number], batch.layout, values[number], None, None)
                progress(f"sinks of layer {index + 1}", sum(value.nbytes for value in layer.parameters()))
    return sinks


def log_sum_exp(attention: Any, hidden_SBH: Tensor, layout: Any) -> Tensor:
    """Of one layer's scaled, biased and masked scores, without its sink: fp32 [B, H, S]."""
    from megatron_vpmoe.model.attention.grape import alibi_slopes

    query, key, _ = attention.scored_qkv(hidden_SBH, attention.turns(layout))
    query, key = (x.permute(1, 2, 0, 3).float() for x in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    score = query @ key.transpose(-1, -2) * attention.softmax_scale
    if attention.position_embedding == "grape_a":
        score -= alibi_slopes(query.shape[1], score.device)[:, None, None] * layout.distance()
    return score.masked_fill(~layout.visible(attention.window), -torch.inf).logsumexp(-1)


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
