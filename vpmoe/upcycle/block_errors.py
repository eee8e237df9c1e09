"""How far a converted block's output is from the original's on the original's own input, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_vpmoe.config import RunConfig
from vpmoe.upcycle.residual_streams import PARTS, Batch, added, embedded
from vpmoe.weights import Weights
from vpmoe.weights.geometry import process_groups
from vpmoe.weights.streamed_model import LayerByLayer

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
