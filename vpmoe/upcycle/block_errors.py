"""How far a converted block's output is from the original's on the original's own input, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from vpmoe.weights import Weights
from vpmoe.weights.geometry import process_groups
from vpmoe.weights.streamed_model import streamed_model

Rung = tuple[RunConfig, Weights]


def block_errors(
    before: Rung, after: Rung, texts: Sequence[Sequence[int]], *, source: str
) -> dict[int, dict[str, float]]:
    """Norm of the difference of outputs over the norm of the original's, over all tokens of the texts.

    Both models have the same number of layers and the same hidden size. Each attention and each feed-forward of
    ``after`` is given what ``before`` gives its own, so errors do not pile up. Keeps four hidden states a layer
    and token.

    Returns:
        layer (from 1) -> "attention" and "feed_forward".
    """
    with process_groups(), torch.no_grad():
        inputs, expected = _recorded(before, texts, None, source)
        _, found = _recorded(after, texts, inputs, source)
    errors: dict[int, dict[str, float]] = {}
    for (number, part), output in expected.items():
        error = (found[number, part] - output).norm() / output.norm()
        errors.setdefault(number, {})[part] = float(error)
    return errors


Recorded = dict[tuple[int, str], Tensor]


def _recorded(
    rung: Rung, texts: Sequence[Sequence[int]], given: Recorded | None, source: str
) -> tuple[Recorded, Recorded]:
    """Residual stream before, and output of, every attention and feed-forward; on the streams of ``given`` if any."""
    from megatron_vpmoe.generation.sampler import left_padded

    model = streamed_model(*rung, source=source)
    tokens, layout = left_padded(texts, torch.device("cpu"))
    real_SB = (layout.document_id >= 0).t()
    inputs: Recorded = {}
    outputs: Recorded = {}
    layers: Any = model.decoder.layers
    for number, layer in enumerate(layers, 1):
        norms = {"attention": layer.input_layernorm, "feed_forward": layer.pre_mlp_layernorm}
        modules = {"attention": layer.self_attention, "feed_forward": layer.mlp}
        for part, norm in norms.items():
            key = (number, part)

            def enter(_norm: Any, arguments: tuple[Tensor], key: tuple[int, str] = key) -> tuple[Tensor]:
                inputs[key] = arguments[0] if given is None else given[key]
                return (inputs[key],)

            def leave(_part: Any, _arguments: Any, result: Any, key: tuple[int, str] = key) -> None:
                out, bias = result[0] if key[1] == "attention" else result
                outputs[key] = (out if bias is None else out + bias)[real_SB]

            norm.register_forward_pre_hook(enter)
            modules[part].register_forward_hook(leave)
    model(tokens, layout)
    return inputs, outputs
