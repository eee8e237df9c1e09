"""The calibrated conversion: layer after layer, each block fitted to the original's residual stream.

Two streams of the calibration texts go through the layers together: the original model's, and that of the model
converted so far. A block of the new model reads the converted stream and is fitted so that the stream after it is the
original's after the same block: what earlier blocks got wrong is part of what it is to put right. Nothing else is
learned from: neither the texts' next tokens nor the model's loss.

Memory: one layer of each model, the embedding for a moment, and the streams: twice 4 bytes a token and hidden channel,
and about as much again while a block is fitted.

Shapes: S sequence, B passages of a batch, C hidden, N real tokens of a batch, F feed-forward width.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import silu

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.files import write_atomically
from vpmoe.upcycle.aligned_heads import merged_heads
from vpmoe.upcycle.block_regression import Block, Regression, fit
from vpmoe.upcycle.plain_shapes import FC1, FC2, PROJ, QKV
from vpmoe.upcycle.residual_streams import PARTS, Batch, added, embedded
from vpmoe.weights import LazyTensor, Weights
from vpmoe.weights.heads import join_heads, split_heads
from vpmoe.weights.streamed_model import LayerByLayer

Progress = Callable[[str, int], None]
Errors = dict[int, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Calibration:
    """What is calibrated, on what, and how.

    Attributes:
        batches: of the calibration texts.
        parts: of "attention" and "feed_forward", those that are; the others stay as the plain conversion has them.
        regression: how a block is fitted; its seed is the whole conversion's.
    """

    batches: Sequence[Batch]
    parts: frozenset[str]
    regression: Regression


def calibrated_layers(
    old: tuple[RunConfig, Weights],
    new: tuple[RunConfig, Weights],
    calibration: Calibration,
    scratch: Path,
    *,
    source: str,
    progress: Progress,
) -> tuple[dict[str, LazyTensor], Errors]:
    """Every layer's tensors of the new model; process groups must exist.

    A finished layer is a file in ``scratch``, read again on each ``load``; what is there already is taken over.

    Args:
        old: the original's geometry and weights.
        new: the new geometry, and the plain conversion's weights.
        scratch: a directory for this conversion alone.
        source: for messages.
        progress: told each layer and its bytes.

    Returns:
        names -> fp32 tensors, and layer (from 1) -> part -> the relative errors on the calibration texts (see ``fit``)
        of the parts that were fitted.
    """
    originals, converted = (LayerByLayer(*rung, source=source) for rung in (old, new))
    streams = embedded(originals, calibration.batches)
    pair = _Streams(streams, [stream.clone() for stream in streams])
    tensors: dict[str, LazyTensor] = {}
    errors: Errors = {}
    for index in range(originals.count):
        path = scratch / f"layer_{index}.safetensors"
        with originals.layer(index) as before, converted.layer(index) as after:
            if path.is_file():
                found, errors[index + 1] = _read(path)
                after.load_state_dict(found, strict=False)
                for part in PARTS:
                    pair.advance(before, after, part, calibration.batches)
            else:
                errors[index + 1] = _convert(index, before, after, (old[0], new[0]), pair, calibration)
                _write(path, after, errors[index + 1])
            for name, value in _state(after).items():
                load = functools.partial(_read_tensor, path, name)
                tensors[f"decoder.layers.{index}.{name}"] = LazyTensor(tuple(value.shape), torch.float32, load)
            progress(f"layer {index + 1}", sum(value.nbytes for value in _state(after).values()))
    return tensors, errors


@dataclass
class _Streams:
    original: list[Tensor]
    converted: list[Tensor]

    def advance(self, before: Any, after: Any, part: str, batches: Sequence[Batch]) -> None:
        """Both streams through one part of a layer."""
        for streams, layer in ((self.original, before), (self.converted, after)):
            for stream, change in zip(streams, added(layer, part, streams, batches), strict=True):
                stream += change


def _convert(
    index: int, before: Any, after: Any, cfgs: tuple[RunConfig, RunConfig], pair: _Streams, how: Calibration
) -> dict[str, dict[str, float]]:
    errors: dict[str, dict[str, float]] = {}
    for number, part in enumerate(PARTS):
        if part in how.parts:
            _START[part](before, after, cfgs, pair, how)
            seed = how.regression.seed + len(PARTS) * index + number
            errors[part] = fit(_block(before, after, part, pair, how.batches), replace(how.regression, seed=seed))
        pair.advance(before, after, part, how.batches)
    return errors


def _block(before: Any, after: Any, part: str, pair: _Streams, batches: Sequence[Batch]) -> Block:
    """A part of the new layer on the converted stream, to bring that to where the original's comes."""
    norm, run = PARTS[part]
    rows = [batch.real_SB.flatten() for batch in batches]
    with torch.no_grad():
        inputs = [getattr(after, norm)(stream) for stream in pair.converted]
        changes = added(before, part, pair.original, batches)
        streams = zip(pair.original, changes, pair.converted, rows, strict=True)
        targets = [(stream + change - now).flatten(0, -2)[real] for stream, change, now, real in streams]
    module, output = {
        "attention": (after.self_attention, after.self_attention.linear_proj),
        "feed_forward": (after.mlp, after.mlp.linear_fc2),
    }[part]
    return Block(module, output, lambda i: run(after, inputs[i], batches[i]), rows, targets)


def _start_attention(
    before: Any, after: Any, cfgs: tuple[RunConfig, RunConfig], pair: _Streams, how: Calibration
) -> None:
    old, new = cfgs
    heads = split_heads(_get(before, QKV), old.model.num_attention_heads, old.model.num_query_groups)
    counts = new.model.num_attention_heads, new.model.num_query_groups
    merged = merged_heads(*heads, _get(before, PROJ), _normed(before.input_layernorm, pair, how), counts)
    _put(after, QKV, join_heads(*merged[:3]))
    _put(after, PROJ, merged[3])


def _start_feed_forward(
    before: Any, after: Any, cfgs: tuple[RunConfig, RunConfig], pair: _Streams, how: Calibration
) -> None:
    with torch.no_grad():
        first, second = _get(before, FC1), _get(before, FC2)
        power = contributions(first, second, _normed(before.pre_mlp_layernorm, pair, how))
    width = cfgs[1].model.ffn_hidden_size
    for name, value in zip((FC1, FC2), squared_relu_neurons(first, second, power, width), strict=True):
        _put(after, name, value)


_START = {"attention": _start_attention, "feed_forward": _start_feed_forward}


def _normed(norm: Any, pair: _Streams, how: Calibration) -> list[Tensor]:
    """What the original's part reads, real tokens only: [N, C] of every batch."""
    with torch.no_grad():
        return [norm(stream)[batch.real_SB] for stream, batch in zip(pair.original, how.batches, strict=True)]


def _state(layer: Any) -> dict[str, Tensor]:
    return {name: value for name, value in layer.state_dict().items() if isinstance(value, Tensor)}


def _get(layer: Any, name: str) -> Tensor:
    return layer.get_parameter(name).detach()


def _put(layer: Any, name: str, value: Tensor) -> None:
    with torch.no_grad():
        layer.get_parameter(name).copy_(value)


def _write(path: Path, layer: Any, errors: dict[str, dict[str, float]]) -> None:
    state = {name: value.contiguous() for name, value in _state(layer).items()}
    write_atomically(path, save(state, metadata={"errors": json.dumps(errors)}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["errors"])


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def contributions(first: Tensor, second: Tensor, inputs: Iterable[Tensor]) -> Tensor:
    """fp64 [F]: the power that each SwiGLU neuron adds to the output, the sum over tokens of |silu(g) u v|².

    Args:
        first: gate over up projection [2 F, C].
        second: [C, F].
        inputs: normed hidden states [N, C], batch by batch.
    """
    power = torch.zeros(second.shape[1], dtype=torch.float64)
    for x in inputs:
        gate, up = (x @ first.t()).chunk(2, -1)
        power += (silu(gate) * up).double().square().sum(0)
    return power * second.double().square().sum(0)


def squared_relu_neurons(first: Tensor, second: Tensor, power: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The strongest neurons as squared-ReLU ones: first matrix [width, C], second [C, width].

    Two for each of width / 2: relu((g + u) / 2)² - relu((g - u) / 2)² is relu(g) u wherever |u| <= |g|; of an odd width
    the last has one.

    Args:
        first: gate over up projection [2 F, C].
        second: [C, F].
        power: of each neuron [F].
        width: squared-ReLU neurons.
    """
    kept = power.topk(-(-width // 2)).indices.sort().values
    gate, up = (half[kept] for half in first.chunk(2))
    first, second = torch.cat([gate + up, gate - up]) / 2, torch.cat([second[:, kept], -second[:, kept]], 1)
    return first[:width], second[:, :width]
