"""One card for each kind of attention and of feed-forward layer: the way from the residual stream and back to it."""

from __future__ import annotations

import math

from megatron_vpmoe.config import LayerGeometry, RunConfig
from vpmoe.describe.drawing import FAINT, INK, LINE, PAPER, Drawing
from vpmoe.describe.layers import ACTIVATION_NAMES

CARD_WIDTH, ATTENTION_HEIGHT, FEED_FORWARD_HEIGHT = 372, 316, 226
COLOURS = {"local": "#8fbbdc", "global": "#1f5a8c", "dense": "#c9c2b4", "moe": "#dd8a4f"}
_TITLES = {
    "local": "Local attention",
    "global": "Global attention",
    "dense": "Dense feed-forward",
    "moe": "Mixture of experts",
}
_STEP, _STEP_GAP, _FLOW_WIDTH = 23.0, 10.0, 204


def attention_kind(layer: LayerGeometry) -> str:
    """Key of the layer's attention in ``COLOURS``."""
    return "global" if layer.is_global else "local"


def feed_forward_kind(layer: LayerGeometry) -> str:
    """Key of the layer's feed-forward part in ``COLOURS``."""
    return "moe" if layer.sparse else "dense"


def _frame(drawing: Drawing, x: float, y: float, height: float, kind: str, members: list[LayerGeometry]) -> None:
    drawing.rect(x, y, CARD_WIDTH, height, "#f7f8f9", stroke="#dde1e5", radius=8)
    drawing.rect(x + 14, y + 14, 12, 12, COLOURS[kind], radius=2)
    drawing.text(x + 34, y + 25, _TITLES[kind], size=13, bold=True)
    numbers = [layer.number for layer in members]
    drawing.text(x + CARD_WIDTH - 14, y + 25, _which(numbers), size=11, fill=FAINT, anchor="end")


def _which(numbers: list[int]) -> str:
    """ "layer 4", "60 layers: 1–3, 5–7, …, 77–79"."""
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    spans = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True)]
    shown = spans if len(spans) <= 3 else [*spans[:2], "…", spans[-1]]
    return f"{len(numbers)} layers: {', '.join(shown)}"


def _flow(drawing: Drawing, x: float, bottom: float, steps: list[str]) -> None:
    """Steps from bottom to top, a residual line to their left, and the addition above."""
    middle = x + 22 + _FLOW_WIDTH / 2
    drawing.arrow((x + 8, bottom + 4), (middle, bottom + 4), (middle, bottom - 6))
    y = bottom - 6
    for index, step in enumerate(steps):
        y -= _STEP
        drawing.box(x + 22, y, _FLOW_WIDTH, _STEP, step)
        if index + 1 < len(steps):
            drawing.arrow((middle, y), (middle, y - _STEP_GAP))
            y -= _STEP_GAP
    _add_to_stream(drawing, x, bottom, [(middle, y)])


def _add_to_stream(drawing: Drawing, x: float, bottom: float, ends: list[tuple[float, float]]) -> None:
    """The residual line, and the addition to it of what arrives at ``ends``, nearest first."""
    stream, plus = x + 8, ends[0][1] - 14
    drawing.line((stream, bottom + 12), (stream, plus - 16))
    for end in reversed(ends):
        drawing.line(end, (end[0], plus), (ends[0][0], plus))
    drawing.arrow((ends[0][0], plus), (stream + 8, plus))
    drawing.plus(stream, plus)


def _expert_flow(drawing: Drawing, x: float, bottom: float, cfg: RunConfig) -> None:
    """The norm, then router and routed experts; the shared expert beside them, which has no router."""
    moe, shared = cfg.moe, cfg.moe.moe_shared_expert_intermediate_size
    width = 122 if shared else _FLOW_WIDTH
    left, middle = x + 22, x + 22 + _FLOW_WIDTH / 2
    norm, router = bottom - 6 - _STEP, bottom - 6 - 2 * _STEP - _STEP_GAP
    experts = router - _STEP - _STEP_GAP
    drawing.arrow((x + 8, bottom + 4), (middle, bottom + 4), (middle, bottom - 6))
    drawing.box(left, norm, _FLOW_WIDTH, _STEP, "RMSNorm")
    drawing.arrow((left + width / 2, norm), (left + width / 2, norm - _STEP_GAP))
    drawing.box(left, router, width, _STEP, f"router, {moe.moe_router_score_function}")
    drawing.arrow((left + width / 2, router), (left + width / 2, router - _STEP_GAP))
    drawing.box(left, experts, width, _STEP, f"{moe.moe_router_topk} experts of {moe.moe_ffn_hidden_size}")
    ends = [(left + width / 2, experts)]
    if shared:
        beside, room = left + width + 10, _FLOW_WIDTH - width - 10
        drawing.arrow((beside + room / 2, norm), (beside + room / 2, norm - _STEP_GAP))
        drawing.box(beside, experts, room, 2 * _STEP + _STEP_GAP, f"shared {shared}")
        ends.append((beside + room / 2, experts))
    _add_to_stream(drawing, x, bottom, ends)


def attention_card(drawing: Drawing, x: float, y: float, cfg: RunConfig, members: list[LayerGeometry]) -> None:
    """One kind of attention: its steps, its pattern of visible keys, and what it costs."""
    m, layer = cfg.model, members[-1]
    _frame(drawing, x, y, ATTENTION_HEIGHT, attention_kind(layer), members)
    steps = ["RMSNorm", f"TPA, ranks {m.tpa_q_rank} and {m.tpa_rank}" if layer.tensor_product else "linear: q, k, v"]
    steps += ["QK-norm"] if m.qk_layernorm else []
    rotation = {"grape_m": "GRAPE-M: learned rotation", "rope": f"RoPE, base {m.rotary_base:,.0f}"}
    steps += [rotation[layer.position]] if layer.position in rotation else []
    steps += ["v ← λ v + (1 − λ) v₁"] if m.value_residual and layer.number > 1 else []
    bias = ", GRAPE-A bias" if layer.position == "grape_a" else ""
    steps += [("softmax with sink" if m.softmax_type == "learnable" else "softmax") + bias]
    steps += [f"linear, {m.num_attention_heads * m.kv_channels} → {m.hidden_size}"]
    _flow(drawing, x + 12, y + ATTENTION_HEIGHT - 26, steps)
    right = x + 256
    _pattern(drawing, right, y + 56, layer, sink=m.softmax_type == "learnable")
    lines = [
        f"{m.num_attention_heads} query heads",
        f"{m.num_query_groups} key/value heads",
        f"head size {m.kv_channels}",
        f"{layer.attention_parameters:,} params",
        f"{layer.cache_bytes:,} B KV a token",
    ]
    for index, words in enumerate(lines):
        drawing.text(right, y + 206 + 17 * index, words, size=11, fill=INK if index < 3 else FAINT)


def _pattern(drawing: Drawing, x: float, y: float, layer: LayerGeometry, *, sink: bool) -> None:
    """Which keys (columns) a query (row) sees, in a document of a few tokens; a bias on distance fades them."""
    cells, size, window = 11, 8.0, 4
    colour = COLOURS[attention_kind(layer)]
    left = x + (14 if sink else 0)
    for query in range(cells):
        if sink:
            drawing.rect(x, y + query * size, size - 1, size - 1, PAPER, stroke=LINE)
        for key in range(query + 1):
            distance = query - key
            seen = layer.window is None or distance < window
            fade = max(0.15, 1 - 0.085 * distance) if layer.position == "grape_a" else 1.0
            fill, opacity = (colour, fade) if seen else ("#e6e9ec", 1.0)
            drawing.rect(
                left + key * size, y + query * size, size - 1, size - 1, fill, opacity=None if opacity == 1 else opacity
            )
    below = y + cells * size + 13
    if sink:
        drawing.text(x - 3, y - 6, "sink", size=9.5, fill=FAINT)
    drawing.text(x + (20 if sink else 0), y - 6, "keys →", size=9.5, fill=FAINT)
    seen = "the whole document" if layer.window is None else f"the last {layer.window} tokens"
    drawing.text(x, below, "a query sees", size=11)
    drawing.text(x, below + 14, seen, size=11)


def feed_forward_card(drawing: Drawing, x: float, y: float, cfg: RunConfig, members: list[LayerGeometry]) -> None:
    """One kind of feed-forward layer: its steps, its experts, and what it costs."""
    m, layer = cfg.model, members[-1]
    _frame(drawing, x, y, FEED_FORWARD_HEIGHT, feed_forward_kind(layer), members)
    bottom = y + FEED_FORWARD_HEIGHT - 26
    if layer.sparse:
        _expert_flow(drawing, x + 12, bottom, cfg)
        _experts(drawing, x + 256, y + 58, cfg)
    else:
        gated = m.activation == "swiglu"
        first = (
            f"gate, up: {m.hidden_size} → 2 × {m.ffn_hidden_size}"
            if gated
            else f"linear, {m.hidden_size} → {m.ffn_hidden_size}"
        )
        middle = "SiLU(gate) · up" if gated else ACTIVATION_NAMES[m.activation]
        _flow(drawing, x + 12, bottom, ["RMSNorm", first, middle, f"linear, {m.ffn_hidden_size} → {m.hidden_size}"])
    lines = [f"{layer.feed_forward_parameters:,} params"]
    if layer.sparse:
        lines += [f"{layer.active_feed_forward_parameters:,} active"]
    for index, words in enumerate(reversed(lines)):
        drawing.text(x + 256, bottom - 17 * index, words, size=11, fill=FAINT)


def _experts(drawing: Drawing, x: float, y: float, cfg: RunConfig) -> None:
    """All experts of a layer, group by group, with the choice of one token in colour."""
    moe = cfg.moe
    experts, groups = moe.num_experts or 0, moe.moe_router_num_groups or 1
    members = experts // groups
    # As near to a square as whole rows for each group allow.
    rows = min(range(1, members + 1), key=lambda r: (abs(math.ceil(members / r) - groups * r), r))
    columns = math.ceil(members / rows)
    size = min(13.0, 88 / columns, 88 / (rows * groups))
    gap = 2.0 if groups > 1 else 0.0
    used = min(moe.moe_router_group_topk or 1, groups, moe.moe_router_topk)
    of_each = moe.moe_router_topk // used
    chosen = {(g * groups // used, (7 * g + k * max(1, members // of_each) + 1) % members)
              for g in range(used) for k in range(of_each)}  # fmt: skip
    for index in range(experts):
        group, member = divmod(index, members)
        row, column = divmod(member, columns)
        fill = COLOURS["moe"] if (group, member) in chosen else "#dfe3e7"
        drawing.rect(x + column * size, y + (group * rows + row) * size + group * gap, 0.8 * size, 0.8 * size, fill)
    named = f"{moe.moe_router_topk} of {experts}" + (f", {groups} groups" if groups > 1 else "")
    drawing.text(x, y - 8, named, size=11)
