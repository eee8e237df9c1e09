"""Rung 5: more layers that compute nothing yet, so that the deeper model is the same function, bit for bit.

New layers come as whole blocks of the layer schedule (local, local, local, global), so every old layer keeps its kind.
A new block copies the old one below it, norms included, except that what it adds to the residual stream is zero: the
output projections of attention and feed-forward and their biases. Its value residual is 1. Zero projections have
gradients at the first step, so the new layers learn.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from megatron_vpmoe.config import RunConfig
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.job import DrawingSettings, Job, Product, Task
from vpmoe.upcycle.rung_below import (
    RungBelow,
    below_and_written,
    in_layer,
    layer_and_name,
    logits_of,
    refuse_changed,
    refuse_other_changes,
    require_same_logits,
)
from vpmoe.weights.tensors import LazyTensor, LogitDifference, random_prompts

VALUE_RESIDUAL = "self_attention.value_residual_scale"
_ADDED_TO_THE_STREAM = tuple(
    f"{linear}.{part}" for linear in ("self_attention.linear_proj", "mlp.linear_fc2") for part in ("weight", "bias")
)


class DepthSettings(DrawingSettings):
    """Settings of ``depth``."""

    prompt_lengths: tuple[int, ...] = Field(default=(1, 7, 33), min_length=1)
    """Lengths of the prompts (of random tokens) on which both models have to give equal logits."""


class Depth(Job[DepthSettings]):
    """``model`` (a dense rung) -> the same function with more layers."""

    name: ClassVar[str] = "depth"
    roles: ClassVar[tuple[str, ...]] = ("model",)
    settings_type = DepthSettings

    def convert(self, task: Task[DepthSettings]) -> Product:
        below = RungBelow.open(task.inputs["model"])
        refuse_other_changes(task, below, {"num_layers"})
        layers = layer_sources(below.cfg, task.cfg, source=task.spec.id)
        task.report["old_layers"] = {index + 1: old + 1 for index, (old, is_new) in enumerate(layers) if not is_new}
        task.report["new_layers_copied_from"] = {
            index + 1: old + 1 for index, (old, is_new) in enumerate(layers) if is_new
        }
        return below.product(task.cfg, deepened(below.weights, layers))

    def verify(self, task: Task[DepthSettings], folder: Path) -> dict[str, Any]:
        below, written = below_and_written(task, folder)
        before = below.cast(task.settings.dtype)
        layers = layer_sources(below.cfg, task.cfg, source=task.spec.id)
        now = {old: index for index, (old, is_new) in enumerate(layers) if not is_new}
        places = {name: layer_and_name(name) for name in before}
        names = {name: in_layer(now[at[0]], at[1]) if at else name for name, at in places.items()}
        refuse_changed(task, before, written, names, what="an old layer's")
        prompts = random_prompts(below.carried.vocab_size, task.settings.prompt_lengths, task.settings.seed)
        found = LogitDifference.between(
            logits_of(below.cfg, before, prompts, source=task.inputs["model"].spec.id),
            logits_of(task.cfg, written, prompts, source=task.spec.id),
        )
        require_same_logits(found, 0.0, "adding layers", source=task.spec.id)
        return {**found.as_json(), "old_tensors_bit_identical": True}


def layer_sources(old: RunConfig, new: RunConfig, *, source: str) -> list[tuple[int, bool]]:
    """For every layer of the deeper model, from 0: (the old layer that it is or copies, whether it is new).

    Raises:
        UpcycleError: fewer layers, layers that are no whole blocks, or routed experts.
    """
    period = 1 if old.model.window_size is None else old.model.window_attn_skip_freq
    before, after = old.model.num_layers, new.model.num_layers
    if before % period or after % period or after < before:
        raise UpcycleError(
            f"{before} -> {after} layers, where the schedule repeats every {period}",
            source=f"{source}: num_layers",
            remedy=f"take multiples of {period}, and no fewer than before",
        )
    if old.moe.num_experts is not None:
        raise UpcycleError(
            "layers with routed experts are not inserted",
            source=f"{source}: num_experts",
            remedy="deepen the dense rung, then add experts",
        )
    blocks = block_sources(before // period, after // period)
    return [(block * period + offset, is_new) for block, is_new in blocks for offset in range(period)]


def block_sources(old: int, new: int) -> list[tuple[int, bool]]:
    """For every block of the deeper model: (the old block that it is or copies, whether it is new).

    New blocks go between the old ones, as evenly as whole blocks allow; each copies the old one below. The first block
    is always the old first one: layer 1's values stay layer 1's.
    """
    added, places = new - old, max(old - 1, 1)
    ends = [added * (place + 1) // places for place in range(places)]
    gaps = [end - begin for begin, end in zip([0, *ends], ends, strict=False)] + [0] * (old - places)
    return [(block, copy > 0) for block, gap in enumerate(gaps) for copy in range(gap + 1)]


def deepened(weights: dict[str, LazyTensor], layers: list[tuple[int, bool]]) -> dict[str, LazyTensor]:
    """The deeper model's tensors; ``layers`` from ``layer_sources``."""
    by_layer: dict[int, dict[str, LazyTensor]] = {}
    result: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        place = layer_and_name(name)
        if place is None:
            result[name] = tensor
        else:
            by_layer.setdefault(place[0], {})[place[1]] = tensor
    mixes = any(VALUE_RESIDUAL in tensors for tensors in by_layer.values())
    for index, (old, is_new) in enumerate(layers):
        tensors = dict(by_layer[old])
        if is_new:
            tensors |= {name: _zeros(tensors[name]) for name in _ADDED_TO_THE_STREAM if name in tensors}
            if mixes:
                # Layer 1 has none, and may be what is copied.
                tensors[VALUE_RESIDUAL] = LazyTensor.of(torch.ones(()))
        result |= {in_layer(index, name): tensor for name, tensor in tensors.items()}
    return result


def _zeros(like: LazyTensor) -> LazyTensor:
    return LazyTensor(like.shape, like.dtype, functools.partial(torch.zeros, like.shape, dtype=like.dtype))
