"""Layers in words, and the folding of a stack's repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_vpmoe.config import LayerGeometry, RunConfig

POSITION_NAMES = {"grape_m": "GRAPE-M", "grape_a": "GRAPE-A", "rope": "RoPE", "none": "none"}
ACTIVATION_NAMES = {"squared_relu": "ReLU²", "swiglu": "SwiGLU"}


def amount(count: float) -> str:
    """Three digits and a unit: 6.02 B, 781 M, 879 K."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def kind_words(layer: LayerGeometry) -> str:
    """Local with its window, or global."""
    return "global" if layer.window is None else f"local {layer.window}"


def attention_words(cfg: RunConfig, layer: LayerGeometry) -> str:
    """The projections: tensor-product with its ranks, or grouped-query."""
    return f"TPA {cfg.model.tpa_q_rank}/{cfg.model.tpa_rank}" if layer.tensor_product else "GQA"


def feed_forward_words(cfg: RunConfig, layer: LayerGeometry) -> str:
    """Dense with its width, or how many experts of how many a token visits."""
    if not layer.sparse:
        return f"dense {cfg.model.ffn_hidden_size}"
    return f"MoE {cfg.moe.moe_router_topk}/{cfg.moe.num_experts}"


def legend(cfg: RunConfig, layers: Sequence[LayerGeometry]) -> list[tuple[str, str]]:
    """What the short words stand for, of those that occur: (word, meaning)."""
    m, moe, activation = cfg.model, cfg.moe, ACTIVATION_NAMES[cfg.model.activation]
    sink = ", softmax with sink" if m.softmax_type == "learnable" else ""
    heads = f"{m.num_attention_heads} query heads, {m.num_query_groups} key/value heads of {m.kv_channels}{sink}"
    lines = [("attention", heads)]
    if any(layer.tensor_product for layer in layers):
        lines.append(("TPA", f"rank {m.tpa_q_rank} for queries, {m.tpa_rank} for keys and for values"))
    if m.value_residual:
        lines.append(("values", "layer 1's are mixed into every later layer"))
    if any(not layer.sparse for layer in layers):
        lines.append(("dense", f"{m.hidden_size} -> {m.ffn_hidden_size} -> {m.hidden_size}, {activation}"))
    if any(layer.sparse for layer in layers):
        shared = moe.moe_shared_expert_intermediate_size
        routed = f"{moe.moe_router_topk} of {moe.num_experts} experts of {moe.moe_ffn_hidden_size}, {activation}"
        lines.append(("MoE", routed + (f"; beside them a shared one of {shared}" if shared else "")))
    return lines


@dataclass(frozen=True)
class Run:
    """Layers in a row that are alike."""

    first: int
    count: int
    layer: LayerGeometry


@dataclass(frozen=True)
class Fold:
    """Runs that occur ``times`` in a row, each ``stride`` layers after the last."""

    runs: tuple[Run, ...]
    times: int

    @property
    def stride(self) -> int:
        """Layers of one repetition."""
        return sum(run.count for run in self.runs)


def alike(layer: LayerGeometry) -> LayerGeometry:
    """The layer without its number: equal for layers that are built and cost alike."""
    return replace(layer, number=0)


def fold(layers: Sequence[LayerGeometry]) -> list[Fold]:
    """The stack as runs and repeated sequences of runs, in order, in as few rows as can be.

    A run alone comes first where both read equally short: layer 4 by itself, and then 19 blocks.
    """
    runs: list[Run] = []
    for _, group in groupby(layers, key=alike):
        members = list(group)
        runs.append(Run(members[0].number, len(members), members[0]))
    kinds = [(run.count, alike(run.layer)) for run in runs]
    # best[i]: rows needed from run i on, and the fold that comes first.
    best: list[tuple[int, Fold | None]] = [(0, None)] * (len(runs) + 1)
    for i in reversed(range(len(runs))):
        best[i] = (1 + best[i + 1][0], Fold((runs[i],), 1))
        for period in range(1, (len(runs) - i) // 2 + 1):
            block, times = kinds[i : i + period], 1
            while kinds[i + times * period : i + (times + 1) * period] == block:
                times += 1
            rows = period + best[i + times * period][0]
            if times > 1 and rows < best[i][0]:
                best[i] = (rows, Fold(tuple(runs[i : i + period]), times))
    folds, i = [], 0
    while (chosen := best[i][1]) is not None:
        folds.append(chosen)
        i += len(chosen.runs) * chosen.times
    return folds


def numbers_of(run: Run, folded: Fold) -> str:
    """The layers of a run over all repetitions: "2-3", or "5-7, 9-11, ..., 77-79"."""
    spans = [_span(run.first + k * folded.stride, run.count) for k in range(folded.times)]
    return ", ".join(spans if len(spans) <= 3 else [*spans[:2], "...", spans[-1]])


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"
