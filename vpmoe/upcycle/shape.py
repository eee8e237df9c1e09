"""Rung 3: Qwen3's blocks in the student's shapes.

Attention loses heads and groups, SwiGLU becomes a narrower squared ReLU, linear layers get biases, a tied output layer
becomes a copy of the embedding. Each of attention and feed-forward is converted plainly (``plain_shapes``: the
baselines) or calibrated (``calibrated_layers``). Norms in front of the blocks are copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.block_regression import Regression
from vpmoe.upcycle.calibrated_layers import Calibration, Errors, calibrated_layers
from vpmoe.upcycle.job import Product, Task
from vpmoe.upcycle.passages import Passages, TextJob, heldout_passages
from vpmoe.upcycle.plain_shapes import FC1, FC2, PROJ, QKV, plain_attention, plain_feed_forward
from vpmoe.upcycle.residual_streams import Rung, batches_of, block_errors
from vpmoe.upcycle.rung_below import RungBelow, below_and_written, layer_and_name, refuse_other_changes, text_loss
from vpmoe.upcycle.shape_settings import ShapeSettings, enough_passages
from vpmoe.upcycle.vocabulary import EMBEDDING, OUTPUT
from vpmoe.weights import LazyTensor, Weights
from vpmoe.weights.geometry import expected_shapes, process_groups

_CHANGED = {
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "activation",
    "add_bias_linear",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
}


class Shape(TextJob[ShapeSettings]):
    """``model`` (a Qwen3 rung) -> the student's shapes, activation and biases, with plain attention."""

    name: ClassVar[str] = "shape"
    version: ClassVar[int] = 2
    roles: ClassVar[tuple[str, ...]] = ("model",)
    settings_type = ShapeSettings

    def convert(self, task: Task[ShapeSettings]) -> Product:
        below = RungBelow.open(task.inputs["model"])
        refuse_other_changes(task, below, _CHANGED)
        _check(below.cfg, task.cfg, source=task.spec.id)
        heldout_passages(task)  # what is wrong with them is said now, not after hours
        passages = enough_passages(task) if task.settings.calibrated else None
        rungs = (below.cfg, below.weights), task.cfg
        weights, errors = convert_blocks(
            *rungs, task.settings, passages, task.scratch, source=task.spec.id, progress=task.progress
        )
        if passages:
            task.report["calibration_tokens"] = passages.num_tokens
            task.report["calibration_error"] = errors
        return below.product(task.cfg, weights)

    def verify(self, task: Task[ShapeSettings], folder: Path) -> dict[str, Any]:
        below, written = below_and_written(task, folder)
        before, passages = (below.cfg, below.weights), heldout_passages(task)
        rungs = {"plain": (task.cfg, reshaped(below.weights, below.cfg, task.cfg)), "after": (task.cfg, written)}
        return measure(before, rungs, passages, task.settings.batch_tokens, source=task.spec.id)


def convert_blocks(
    old: Rung,
    new: RunConfig,
    settings: ShapeSettings,
    passages: Passages | None,
    scratch: Path,
    *,
    source: str,
    progress: Callable[[str, int], None],
) -> tuple[dict[str, LazyTensor], Errors]:
    """The new model's weights by the methods that the settings name.

    Args:
        old: the original.
        new: the new geometry.
        passages: to calibrate on; None where no part is calibrated.
        scratch: a directory for this conversion alone; the weights are read from it.
        source: for messages.
        progress: told each calibrated layer and its bytes.

    Returns:
        names -> tensors, and what ``calibrated_layers`` says of the errors on the calibration texts.
    """
    plain = reshaped(old[1], old[0], new)
    if passages is None:
        return plain, {}
    calibration = Calibration(
        batches=batches_of(passages, settings.batch_tokens),
        parts=settings.calibrated,
        regression=Regression(settings.ridge, settings.steps, settings.learning_rate, settings.seed),
    )
    with process_groups():
        layers, errors = calibrated_layers(old, (new, plain), calibration, scratch, source=source, progress=progress)
    return {name: layers.get(name, tensor).to(tensor.dtype) for name, tensor in plain.items()}, errors


def measure(
    before: Rung, rungs: Mapping[str, Rung], passages: Passages, batch_tokens: int, *, source: str
) -> dict[str, Any]:
    """Losses of a model and its conversions on held-out text, in nats a token, and each conversion's block errors."""
    batches = batches_of(passages, batch_tokens)
    losses = {name: text_loss(*rung, passages, source=source) for name, rung in {"before": before, **rungs}.items()}
    return {
        "heldout_tokens": passages.num_tokens,
        "scored_tokens": passages.num_scored,
        "loss": losses,
        "perplexity": {name: float(torch.tensor(loss).double().exp()) for name, loss in losses.items()},
        "relative_output_error": {
            name: block_errors(before, rung, batches, source=source) for name, rung in rungs.items()
        },
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
    """The plain conversion: the tensors of ``new`` from those of ``old``."""

    def attention(name: str, index: int) -> Tensor:
        return plain_attention(weights, index, old, new)[name]

    def feed_forward(name: str, index: int) -> Tensor:
        return plain_feed_forward(weights, index, new)[name]

    changes: dict[str, Callable[[str, int], Tensor]] = {
        QKV: attention,
        PROJ: attention,
        FC1: feed_forward,
        FC2: feed_forward,
    }
    result: dict[str, LazyTensor] = {}
    for name, shape in expected_shapes(new).items():
        place = layer_and_name(name)
        if place and place[1] in changes:
            load = functools.partial(changes[place[1]], place[1], place[0])
            result[name] = LazyTensor(shape, torch.float32, load).to(weights[name].dtype)
        elif place and place[1].endswith(".bias"):
            dtype = weights[name.removesuffix("bias") + "weight"].dtype
            result[name] = LazyTensor(shape, dtype, functools.partial(torch.zeros, shape, dtype=dtype))
        elif name == OUTPUT and OUTPUT not in weights:
            result[name] = weights[EMBEDDING]
        else:
            result[name] = weights[name]
    return result
