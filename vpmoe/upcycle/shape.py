"""Rung 3: Qwen3's blocks in the student's shapes, without calibration.

Attention is mean-pooled: consecutive query heads, and consecutive groups' keys and values, become their mean; the
output projection's columns are summed over the heads that became one, since a mean would shrink the output. Of the
feed-forward the neurons with the largest columns of the second matrix stay; a neuron's silu(g) u becomes
relu((g + u) / 2)², which is g u where gate and up projection agree. Norms are copied, biases are zero, an output layer
that was tied becomes a copy of the embedding.

This is the plain conversion, and it loses most of what the model knew: the receipt has each block's error and the loss.

Shapes: H heads, G groups, D head dim, C hidden, F feed-forward width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.model.attention.mixed_qkv import mixed_qkv_rows, split_mixed_qkv
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.block_errors import block_errors
from vpmoe.upcycle.job import Job, JobSettings, Product, Task
from vpmoe.upcycle.rung_below import RungBelow, in_layer, layer_and_name, refuse_other_changes, text_loss
from vpmoe.upcycle.vocabulary import EMBEDDING, OUTPUT, tokens_of
from vpmoe.weights import LazyTensor, Weights, megatron_checkpoint
from vpmoe.weights.geometry import expected_shapes

_CHANGED = {
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "activation",
    "add_bias_linear",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
}


class ShapeSettings(JobSettings):
    """Settings of ``shape``."""

    texts: list[str] = Field(min_length=1)
    """On which errors and losses are measured."""
    text_tokens: int = Field(default=512, ge=2)
    """Most tokens of a text that are read."""


class Shape(Job[ShapeSettings]):
    """``model`` (a Qwen3 rung) -> the student's shapes, activation and biases, with plain attention."""

    name: ClassVar[str] = "shape"
    roles: ClassVar[tuple[str, ...]] = ("model",)
    settings_type = ShapeSettings

    def convert(self, task: Task[ShapeSettings]) -> Product:
        below = RungBelow.open(task.inputs["model"])
        refuse_other_changes(task, below, _CHANGED)
        _check(below.cfg, task.cfg, source=task.spec.id)
        return below.product(task.cfg, reshaped(below.weights, below.cfg, task.cfg))

    def verify(self, task: Task[ShapeSettings], folder: Path) -> dict[str, Any]:
        below = RungBelow.open(task.inputs["model"])
        written = megatron_checkpoint.read_weights(folder / "megatron" / megatron_checkpoint.ITERATION)
        texts = tokens_of(task.inputs["model"].hf, task.settings.texts, task.settings.text_tokens)
        losses = [
            text_loss(cfg, weights, texts, source=task.spec.id)
            for cfg, weights in ((below.cfg, below.weights), (task.cfg, written))
        ]
        return {
            "texts_tokens": sum(len(text) - 1 for text in texts),
            "loss": dict(zip(("before", "after"), losses, strict=True)),
            "perplexity": dict(zip(("before", "after"), map(math.exp, losses), strict=True)),
            "relative_output_error": block_errors(
                (below.cfg, below.weights), (task.cfg, written), texts, source=task.spec.id
            ),
        }


def _check(old: RunConfig, new: RunConfig, *, source: str) -> None:
    before, after = old.model, new.model
    met = {
        "activation": (before.activation, after.activation) == ("swiglu", "squared_relu"),
        "add_bias_linear": not before.add_bias_linear,
        "add_qkv_bias": not before.add_qkv_bias,
        "num_attention_heads": before.num_attention_heads % after.num_attention_heads == 0,
        "num_query_groups": before.num_query_groups % after.num_query_groups == 0,
        "ffn_hidden_size": after.ffn_hidden_size <= before.ffn_hidden_size,
        "untie_embeddings_and_output_weights": after.untie_embeddings_and_output_weights,
        "num_experts": old.moe.num_experts is None,
        "tpa": not before.tpa,
    }
    unmet = [
        f"{name}: {getattr(before, name, None)} -> {getattr(after, name, None)}" for name, ok in met.items() if not ok
    ]
    if unmet:
        raise UpcycleError(
            "these shapes are not converted into each other: " + ", ".join(unmet),
            source=source,
            remedy="from SwiGLU without biases to squared ReLU, to divisors of the heads and groups, untied",
        )


def reshaped(weights: Weights, old: RunConfig, new: RunConfig) -> dict[str, LazyTensor]:
    """The tensors of ``new`` from those of ``old``."""
    shapes = expected_shapes(new)
    changes: dict[str, Callable[[int], Tensor]] = {
        "self_attention.linear_qkv.weight": lambda n: _qkv(weights[in_layer(n, _QKV)].read(), old, new),
        "self_attention.linear_proj.weight": lambda n: _projection(weights[in_layer(n, _PROJ)].read(), old, new),
        "mlp.linear_fc1.weight": lambda n: _first_matrix(*_feed_forward(weights, n), new.model.ffn_hidden_size),
        "mlp.linear_fc2.weight": lambda n: _second_matrix(*_feed_forward(weights, n), new.model.ffn_hidden_size),
    }
    result: dict[str, LazyTensor] = {}
    for name, shape in shapes.items():
        place = layer_and_name(name)
        if place and place[1] in changes:
            result[name] = LazyTensor(shape, weights[name].dtype, functools.partial(changes[place[1]], place[0]))
        elif place and place[1].endswith(".bias"):
            dtype = weights[name.removesuffix("bias") + "weight"].dtype
            result[name] = LazyTensor(shape, dtype, functools.partial(torch.zeros, shape, dtype=dtype))
        elif name == OUTPUT and OUTPUT not in weights:
            result[name] = weights[EMBEDDING]
        else:
            result[name] = weights[name]
    return result


_QKV = "self_attention.linear_qkv.weight"
_PROJ = "self_attention.linear_proj.weight"


def _qkv(mixed: Tensor, old: RunConfig, new: RunConfig) -> Tensor:
    """Means over runs of heads and groups, in Megatron's mixed layout again."""
    before, after = old.model, new.model
    parts = split_mixed_qkv(mixed.float().t(), before.num_attention_heads, before.num_query_groups)  # [C, heads, D]
    counts = (after.num_attention_heads, after.num_query_groups, after.num_query_groups)
    rows = mixed_qkv_rows(after.num_attention_heads, after.num_query_groups, after.kv_channels)
    pooled = mixed.new_empty(sum(len(row) for row in rows), mixed.shape[1])
    for part, count, row in zip(parts, counts, rows, strict=True):
        mean = part.unflatten(1, (count, -1)).mean(2)
        pooled[row] = mean.flatten(1).t().to(mixed.dtype)
    return pooled


def _projection(weight: Tensor, old: RunConfig, new: RunConfig) -> Tensor:
    """[C, H D] -> [C, H' D]: the sum over the heads that became one."""
    heads, dim = new.model.num_attention_heads, new.model.kv_channels
    together = old.model.num_attention_heads // heads
    return weight.float().unflatten(1, (heads, together, dim)).sum(2).flatten(1).to(weight.dtype)


def _feed_forward(weights: Weights, index: int) -> tuple[Tensor, Tensor]:
    first, second = (weights[in_layer(index, f"mlp.linear_{name}.weight")].read() for name in ("fc1", "fc2"))
    return first, second


def _first_matrix(first: Tensor, second: Tensor, width: int) -> Tensor:
    gate, up = first.float().chunk(2)
    return ((gate + up) / 2)[_largest(second, width)].to(first.dtype)


def _second_matrix(_first: Tensor, second: Tensor, width: int) -> Tensor:
    return second[:, _largest(second, width)]


def _largest(second: Tensor, width: int) -> Tensor:
    """Indices, ascending, of the neurons with the largest columns."""
    return second.float().norm(dim=0).topk(width).indices.sort().values
