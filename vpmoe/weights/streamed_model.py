"""A model for a pass or two over weights that do not fit into memory: a layer's are read when the pass comes to it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_vpmoe.config import RunConfig
from vpmoe.weights.geometry import config_of, expected_shapes, geometry_of
from vpmoe.weights.tensors import Weights, check_geometry

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel

_LAYER = "decoder.layers.{}."


def streamed_model(cfg: RunConfig, weights: Weights, *, source: str) -> VPModel:
    """A model in evaluation mode and fp32 that holds embedding, output layer and one layer at a time, on the CPU.

    Equal to ``load_model``'s in every number. For passes without gradients; each reads all layers again, so give it all
    tokens at once. Process groups must exist (``process_groups``) while it is used.

    Args:
        cfg: whose ``model`` and ``moe`` sections are the geometry; its parallel sizes and precision do not matter.
        weights: every tensor of the model.
        source: of the weights, for messages.

    Raises:
        WeightsError: names or shapes disagree with the geometry.
    """
    model = _empty_model(cfg, weights, source)
    layers: Any = model.decoder.layers
    of_decoder = ((f"decoder.{name}", module) for name, module in model.decoder.named_children())
    for name, module in (*model.named_children(), *of_decoder):
        if name not in ("decoder", "decoder.layers"):
            _fill(module, f"{name}.", weights)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(functools.partial(_enter, _LAYER.format(index), weights))
        layer.register_forward_hook(_leave)
    return model


class LayerByLayer:
    """A model's embedding and layers, each in memory, in evaluation mode and fp32, only while it is used.

    For work that takes all texts through one layer before it comes to the next. Process groups must exist
    (``process_groups``) while it is used.

    Args:
        cfg: whose ``model`` and ``moe`` sections are the geometry.
        weights: every tensor of the model; those of a layer are looked up when it is used.
        source: of the weights, for messages.

    Raises:
        WeightsError: names or shapes disagree with the geometry.
    """

    def __init__(self, cfg: RunConfig, weights: Weights, *, source: str) -> None:
        self._weights = weights
        self._model = _empty_model(cfg, weights, source)

    @property
    def count(self) -> int:
        """Layers."""
        return len(self._model.decoder.layers)

    @contextlib.contextmanager
    def embedding(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """int64 [B, S] -> the residual stream [S, B, H] before the first layer."""
        embedding = self._model.embedding
        _fill(embedding, "embedding.", self._weights)
        yield lambda tokens_BS: embedding(input_ids=tokens_BS, position_ids=None)
        embedding.to("meta")

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """A layer (from 0), filled; what is changed in it is not kept."""
        layer = self._model.decoder.layers[index]
        _fill(layer, _LAYER.format(index), self._weights)
        yield layer
        layer.to("meta")


def _empty_model(cfg: RunConfig, weights: Weights, source: str) -> VPModel:
    from megatron_vpmoe.model.builder import build_model

    cfg = config_of(geometry_of(cfg), source=source)
    check_geometry(weights, expected_shapes(cfg), source=source)
    return build_model(cfg, device=torch.device("meta")).eval().requires_grad_(False)


def _enter(prefix: str, weights: Weights, layer: nn.Module, _arguments: Any) -> None:
    _fill(layer, prefix, weights)


def _leave(layer: nn.Module, _arguments: Any, _result: Any) -> None:
    layer.to("meta")


def _fill(module: nn.Module, prefix: str, weights: Weights) -> None:
    module.to_empty(device="cpu")
    for buffer in module.buffers():
        buffer.zero_()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor) and f"{prefix}{name}" in weights:
            tensor.copy_(weights[f"{prefix}{name}"].read())
