"""Texts on their way through models, layer by layer: the residual stream of every batch, and what layers do with it.

Shapes: S sequence, B passages of a batch, C hidden, N real tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from vpmoe.upcycle.passages import Passages
from vpmoe.weights import Weights
from vpmoe.weights.geometry import process_groups
from vpmoe.weights.streamed_model import LayerByLayer


@dataclass(frozen=True)
class Batch:
    """Passages padded to one length.

    Attributes:
        tokens_BS: int64.
        layout: of documents and positions.
        real_SB: bool; False on padding.
    """

    tokens_BS: Tensor
    layout: Any
    real_SB: Tensor


def batches_of(passages: Passages, most_tokens: int) -> list[Batch]:
    """Passages as batches of at most so many positions; a longer passage is a batch of its own."""
    from megatron_vpmoe.model.attention.masks import left_padded

    found = []
    for indices in passages.batches(most_tokens):
        tokens, layout = left_padded([passages.tokens[index] for index in indices], torch.device("cpu"))
        found.append(Batch(tokens, layout, (layout.document_id >= 0).t()))
    return found


def embedded(model: LayerByLayer, batches: Sequence[Batch]) -> list[Tensor]:
    """The residual stream [S, B, C] before the first layer, of every batch."""
    with model.embedding() as embed, torch.no_grad():
        return [embed(batch.tokens_BS) for batch in batches]


Part = Callable[[Any, Tensor, Batch], Tensor]


def attention(layer: Any, normed: Tensor, batch: Batch) -> Tensor:
    """What a layer's attention adds to the stream [S, B, C], of its normed input."""
    (out, bias), _ = layer.self_attention(normed, batch.layout)
    return out if bias is None else out + bias


def feed_forward(layer: Any, normed: Tensor, _batch: Batch) -> Tensor:
    """What a layer's feed-forward adds to the stream [S, B, C], of its normed input."""
    out, bias = layer.mlp(normed)
    return out if bias is None else out + bias


PARTS: dict[str, tuple[str, Part]] = {
    "attention": ("input_layernorm", attention),
    "feed_forward": ("pre_mlp_layernorm", feed_forward),
}
"""Of a layer, in order: the name of the norm before it, and what it computes."""


def added(layer: Any, part: str, streams: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
    """What a part of a layer adds to every batch's stream."""
    norm, run = PARTS[part]
    with torch.no_grad():
        return [run(layer, getattr(layer, norm)(stream), batch) for stream, batch in zip(streams, batches, strict=True)]


Rung = tuple[RunConfig, Weights]


def block_errors(before: Rung, after: Rung, batches: Sequence[Batch], *, source: str) -> dict[int, dict[str, float]]:
    """Norm of the difference of outputs over the norm of the original's, over all tokens of the batches.

    Both models have the same number of layers and the same hidden size. Each attention and each feed-forward of
    ``after`` is given the residual stream that ``before`` gives its own, so errors do not pile up. Memory holds one
    layer of each and the stream.

    Returns:
        layer (from 1) -> "attention" and "feed_forward".
    """
    errors: dict[int, dict[str, float]] = {}
    with process_groups(), torch.no_grad():
        models = [LayerByLayer(*rung, source=source) for rung in (before, after)]
        streams = embedded(models[0], batches)
        for index in range(models[0].count):
            errors[index + 1] = {}
            with models[0].layer(index) as old, models[1].layer(index) as new:
                for part in PARTS:
                    right, found = (added(layer, part, streams, batches) for layer in (old, new))
                    wrong = power = 0.0
                    for batch, a, b in zip(batches, right, found, strict=True):
                        wrong += float((a - b)[batch.real_SB].double().square().sum())
                        power += float(a[batch.real_SB].double().square().sum())
                    errors[index + 1][part] = (wrong / power) ** 0.5
                    for stream, change in zip(streams, right, strict=True):
                        stream += change
    return errors
