"""Rung 4: grouped-query attention with RoPE becomes the student's attention, switch by switch.

Local layers: tensor-product projections of constant factors, GRAPE-M at RoPE's frequencies, windows. Global layers: a
bias on distance (GRAPE-A) instead of RoPE. All layers: sinks from calibration, value residual at 1. Nothing else
changes. The receipt is a ledger: each switch alone on the model below, its logit difference and what it costs on texts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.model.attention.grape import initial_log_frequencies
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.constant_factors import constant_factors, relative_error
from vpmoe.upcycle.job import Product, Task
from vpmoe.upcycle.passages import TextJob, TextSettings, calibration_passages, heldout_passages
from vpmoe.upcycle.residual_streams import Batch, batches_of
from vpmoe.upcycle.rung_below import (
    RungBelow,
    below_and_written,
    in_layer,
    layer_and_name,
    logits_of,
    refuse_other_changes,
    require_same_logits,
    text_loss,
)
from vpmoe.upcycle.sinks import calibrate_sinks
from vpmoe.weights import LazyTensor, Weights
from vpmoe.weights.geometry import config_of, geometry_of
from vpmoe.weights.heads import split_heads
from vpmoe.weights.tensors import LogitDifference, random_prompts

_QKV = "self_attention.linear_qkv."
_SINK = "self_attention.sink"
# Field -> value of the model below; the rest of what a morph sets is idle there.
_PLAIN = {
    "softmax_type": "vanilla",
    "window_size": None,
    "global_position_embedding": "rope",
    "tpa": False,
    "value_residual": False,
}
_CHANGED = {*_PLAIN, "local_position_embedding", "window_attn_skip_freq", "tpa_rank", "tpa_q_rank", "tpa_factor_bias"}


class MorphSettings(TextSettings):
    """Settings of ``morph``."""

    sink_mass: float = Field(default=0.01, gt=0, lt=1)
    """Part of the attention that a head's sink takes, in the mean over the calibration text."""
    prompt_lengths: tuple[int, ...] = Field(default=(1, 7, 33), min_length=1)
    """Lengths of the prompts (of random tokens) of the ledger's logit differences; none above the window."""
    logit_tolerance: float = Field(default=1e-4, gt=0)
    """Largest allowed logit difference of an exact switch in fp32, relative to the largest logit where that is above
    1."""

    @property
    def calibrated(self) -> frozenset[str]:
        """The sinks."""
        return frozenset({"sinks"})


class Morph(TextJob[MorphSettings]):
    """``model`` (full causal grouped-query attention with RoPE) -> the same model with the student's attention."""

    name: ClassVar[str] = "morph"
    version: ClassVar[int] = 2
    roles: ClassVar[tuple[str, ...]] = ("model",)
    settings_type = MorphSettings

    def convert(self, task: Task[MorphSettings]) -> Product:
        below = RungBelow.open(task.inputs["model"])
        _check(task, below)
        heldout_passages(task)  # what is wrong with them is said now
        passages = calibration_passages(task)
        sinks = _sinks(task, below.weights, task.cfg, batches_of(passages, task.settings.batch_tokens))
        task.report["calibration_tokens"] = passages.num_tokens
        task.report["sinks"] = {number: sink.tolist() for number, sink in sinks.items()}
        task.report["factor_errors"] = factor_errors(below.weights, task.cfg)
        return below.product(task.cfg, morphed(below.weights, task.cfg, sinks))

    def verify(self, task: Task[MorphSettings], folder: Path) -> dict[str, Any]:
        below, written = below_and_written(task, folder)
        ledger = Ledger(task, below)
        found = switches(task.cfg, below.cfg, endless=ledger.longest + 1)
        entries = {name: ledger.entry(cfg, exact=exact) for name, (cfg, exact) in found.items()}
        return {
            "heldout_tokens": ledger.heldout.num_tokens,
            "scored_tokens": ledger.heldout.num_scored,
            "loss_before": ledger.loss_before,
            "loss_after": ledger.loss(task.cfg, written),
            "switches": entries,
        }


class Ledger:
    """What single switches cost, measured on the model below in fp32."""

    def __init__(self, task: Task[MorphSettings], below: RungBelow) -> None:
        self.task, self.below, self.heldout = task, below, heldout_passages(task)
        calibration = calibration_passages(task)
        self.batches = batches_of(calibration, task.settings.batch_tokens)
        self.source = task.inputs["model"].spec.id
        self.prompts = random_prompts(below.carried.vocab_size, task.settings.prompt_lengths, task.settings.seed)
        self.longest = max(map(len, [*self.prompts, *self.heldout.tokens, *calibration.tokens]))
        self.logits_before = logits_of(below.cfg, below.weights, self.prompts, source=self.source)
        self.loss_before = self.loss(below.cfg, below.weights)

    def loss(self, cfg: RunConfig, weights: Weights) -> float:
        """On the held-out text, in nats a token."""
        return text_loss(cfg, weights, self.heldout, source=self.source)

    def entry(self, cfg: RunConfig, *, exact: bool) -> dict[str, Any]:
        """Logit difference on short prompts and loss on the texts of the model below under ``cfg``.

        Raises:
            UpcycleError: an exact switch is none.
        """
        weights = morphed(self.below.weights, cfg, _sinks(self.task, self.below.weights, cfg, self.batches))
        logits = logits_of(cfg, weights, self.prompts, source=self.source)
        found = LogitDifference.between(self.logits_before, logits)
        if exact:
            place = f"{self.task.spec.id}: {_features(cfg)}"
            require_same_logits(found, self.task.settings.logit_tolerance, "an exact switch", source=place)
        loss = self.loss(cfg, weights)
        return {"exact_on_short_prompts": exact, **found.as_json(), "loss": loss, "cost": loss - self.loss_before}


def switches(new: RunConfig, old: RunConfig, *, endless: int) -> dict[str, tuple[RunConfig, bool]]:
    """Name -> (the geometry of the model below with this switch alone, whether short prompts keep their logits).

    Without the window's own switch, local layers have a window of ``endless`` tokens, more than any text has.
    """
    model = new.model
    local = {"window_size": endless, "window_attn_skip_freq": model.window_attn_skip_freq}
    rotation = {"local_position_embedding": "rope", "global_position_embedding": "rope"}
    exact_rank = model.tpa_q_rank >= model.num_attention_heads and model.tpa_rank >= model.num_query_groups
    changes: dict[str, tuple[dict[str, Any], bool]] = {
        "tpa": (
            {
                **local,
                **{name: getattr(model, name) for name in ("tpa", "tpa_rank", "tpa_q_rank", "tpa_factor_bias")},
            },
            exact_rank,
        ),
        "local_position_embedding": ({**local, "local_position_embedding": model.local_position_embedding}, True),
        "value_residual": ({"value_residual": model.value_residual}, True),
        "window_size": ({**local, "window_size": model.window_size}, True),
        "global_position_embedding": (
            {**local, "global_position_embedding": model.global_position_embedding},
            False,
        ),
        "softmax_type": ({"softmax_type": model.softmax_type}, False),
    }
    # All that keep short prompts' logits, together.
    together: dict[str, Any] = {}
    for change, exact in changes.values():
        together |= change if exact else {}
    together["window_size"] = model.window_size
    changes["all_exact"] = (together, True)
    base = geometry_of(old)
    return {
        name: (config_of({**base, "model": {**base["model"], **rotation, **change}}, source=f"switch {name}"), exact)
        for name, (change, exact) in changes.items()
    }


def morphed(weights: Weights, cfg: RunConfig, sinks: Mapping[int, Tensor]) -> dict[str, LazyTensor]:
    """The tensors of ``cfg`` from those of plain grouped-query attention; sinks that are not given are zero."""
    model = cfg.model
    result: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        place = layer_and_name(name)
        if place is None or not (place[1].startswith(_QKV) and cfg.is_tpa_layer(place[0] + 1)):
            result[name] = tensor
        elif place[1].endswith("bias"):
            result[in_layer(place[0], "self_attention.qkv_bias")] = tensor
        else:
            result |= _factors(place[0], tensor, cfg)
    for index in range(model.num_layers):
        if cfg.position_embedding(index + 1) == "grape_m":
            frequencies = initial_log_frequencies(model.kv_channels, model.rotary_base, model.grapem_log_freq_scale)
            result[in_layer(index, "self_attention.grape_log_freq")] = LazyTensor.of(frequencies)
        if model.softmax_type == "learnable":
            sink = sinks.get(index + 1, torch.zeros(model.num_attention_heads))
            result[in_layer(index, _SINK)] = LazyTensor.of(sink)
        if model.value_residual and index > 0:
            result[in_layer(index, "self_attention.value_residual_scale")] = LazyTensor.of(torch.ones(()))
    return result


def _factors(index: int, qkv: LazyTensor, cfg: RunConfig) -> dict[str, LazyTensor]:
    model = cfg.model
    heads, groups, dim, hidden = model.num_attention_heads, model.num_query_groups, model.kv_channels, qkv.shape[1]
    rows_a = heads * model.tpa_q_rank + 2 * groups * model.tpa_rank
    rows_b = (model.tpa_q_rank + 2 * model.tpa_rank) * dim
    zeros = functools.partial(torch.zeros, rows_a, hidden, dtype=qkv.dtype)
    return {
        in_layer(index, "self_attention.linear_tpa_a.weight"): LazyTensor((rows_a, hidden), qkv.dtype, zeros),
        in_layer(index, "self_attention.linear_tpa_a.bias"): LazyTensor(
            (rows_a,), qkv.dtype, functools.partial(_factor, qkv, cfg, 0)
        ),
        in_layer(index, "self_attention.linear_tpa_b.weight"): LazyTensor(
            (rows_b, hidden), qkv.dtype, functools.partial(_factor, qkv, cfg, 1)
        ),
    }


def _factor(qkv: LazyTensor, cfg: RunConfig, which: int) -> Tensor:
    """The A factors in one row, or the B factors row by row, in the order q, k, v."""
    parts = [constant_factors(heads, rank)[which] for heads, rank in _projections(qkv, cfg).values()]
    flat = [part.flatten() if which == 0 else part.flatten(0, 1) for part in parts]
    return torch.cat(flat).to(qkv.dtype)


def _projections(qkv: LazyTensor, cfg: RunConfig) -> dict[str, tuple[Tensor, int]]:
    """q, k, v -> (fp32 [heads or groups, D, C], rank)."""
    model = cfg.model
    heads = split_heads(qkv.read().float(), model.num_attention_heads, model.num_query_groups)
    ranks = (model.tpa_q_rank, model.tpa_rank, model.tpa_rank)
    return {name: (part, rank) for name, part, rank in zip("qkv", heads, ranks, strict=True)}


def factor_errors(weights: Weights, cfg: RunConfig) -> dict[int, dict[str, float]]:
    """Layer (from 1) -> relative Frobenius error of its q, k and v as constant factors."""
    found = {}
    for number in range(1, cfg.model.num_layers + 1):
        if cfg.is_tpa_layer(number):
            qkv = weights[in_layer(number - 1, f"{_QKV}weight")]
            found[number] = {name: relative_error(*pair) for name, pair in _projections(qkv, cfg).items()}
    return found


def _sinks(task: Task[MorphSettings], below: Weights, cfg: RunConfig, batches: Sequence[Batch]) -> dict[int, Tensor]:
    """Calibrated ones of a geometry of the model below; none where it has no sinks."""
    if cfg.model.softmax_type != "learnable":
        return {}
    weights, source = morphed(below, cfg, {}), task.inputs["model"].spec.id
    return calibrate_sinks(cfg, weights, batches, task.settings.sink_mass, source=source, progress=task.progress)


def _check(task: Task[MorphSettings], below: RungBelow) -> None:
    refuse_other_changes(task, below, _CHANGED)
    found = {name: getattr(below.cfg.model, name) for name in _PLAIN}
    new = task.cfg.model
    if found != _PLAIN or below.cfg.moe.num_experts is not None:
        raise UpcycleError(
            f"the model below is not plain: {found}", source=task.inputs["model"].spec.id, remedy=f"morph from {_PLAIN}"
        )
    if not (new.tpa and new.tpa_factor_bias and new.window_size is not None):
        raise UpcycleError(
            f"tpa {new.tpa}, tpa_factor_bias {new.tpa_factor_bias}, window_size {new.window_size}",
            source=task.spec.id,
            remedy="a morph needs tensor-product local layers whose A factors have biases",
        )
    if max(task.settings.prompt_lengths) > new.window_size:
        raise UpcycleError(
            f"prompts of {max(task.settings.prompt_lengths)} tokens, a window of {new.window_size}",
            source="prompt_lengths",
            remedy="the ledger's prompts must fit into the window",
        )


def _features(cfg: RunConfig) -> dict[str, Any]:
    return {name: getattr(cfg.model, name) for name in sorted(_CHANGED)}
