"""The stack as a picture: all layers from bottom to top, and beside them what each kind is made of."""

from __future__ import annotations

import math

from megatron_vpmoe.config import (
    LayerGeometry,
    RunConfig,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    layer_geometries,
    parameter_count,
)
from vpmoe.describe.cards import (
    ATTENTION_HEIGHT,
    CARD_WIDTH,
    COLOURS,
    FEED_FORWARD_HEIGHT,
    attention_card,
    attention_kind,
    feed_forward_card,
    feed_forward_kind,
)
from vpmoe.describe.drawing import FAINT, LINE, Drawing
from vpmoe.describe.layers import amount

_MARGIN, _TOP, _GAP = 28, 84, 20
_CARDS_LEFT = 330
_BAR_LEFT, _BAR_WIDTH, _STRIP_LEFT, _STRIP_WIDTH = 84, 112, 202, 52
_END_HEIGHT, _END_GAP = 24, 10


def stack_picture(cfg: RunConfig) -> str:
    """The SVG text of the model that ``cfg`` describes; a pure function of the configuration."""
    layers = layer_geometries(cfg)
    attention: dict[str, list[LayerGeometry]] = {}
    feed_forward: dict[str, list[LayerGeometry]] = {}
    for layer in layers:
        attention.setdefault(attention_kind(layer), []).append(layer)
        feed_forward.setdefault(feed_forward_kind(layer), []).append(layer)
    in_one_row = len(attention) + len(feed_forward) <= 2
    height = ATTENTION_HEIGHT if in_one_row else ATTENTION_HEIGHT + _GAP + FEED_FORWARD_HEIGHT
    drawing = Drawing(_CARDS_LEFT + 2 * CARD_WIDTH + _GAP + _MARGIN, _TOP + height + _MARGIN)
    drawing.rect(0, 0, drawing.width, drawing.height, "#ffffff")
    _headline(drawing, cfg)
    _stack(drawing, cfg, layers, height)
    places = [(_CARDS_LEFT + i * (CARD_WIDTH + _GAP), _TOP) for i in range(2)]
    for (x, y), members in zip(places, attention.values(), strict=False):
        attention_card(drawing, x, y, cfg, members)
    below = places[1:] if in_one_row else [(x, y + ATTENTION_HEIGHT + _GAP) for x, y in places]
    for (x, y), members in zip(below, feed_forward.values(), strict=False):
        feed_forward_card(drawing, x, y, cfg, members)
    return drawing.render(f"{cfg.model.num_layers} layers of hidden size {cfg.model.hidden_size}")


def _headline(drawing: Drawing, cfg: RunConfig) -> None:
    m, count = cfg.model, parameter_count(cfg)
    flops = amount(forward_flops_per_token(cfg)).replace(" B", " G")
    drawing.text(_MARGIN, 36, f"{m.num_layers} layers, hidden size {m.hidden_size}", size=18, bold=True)
    active = f" ({amount(count.active)} active)" if count.active != count.total else ""
    figures = [
        f"{amount(count.total)} parameters{active}",
        f"{flops}FLOP a token forward at {cfg.data.seq_length:,} tokens",
        f"{kv_cache_bytes_per_token(cfg) / 1024:,.4g} KiB of keys and values a token",
    ]
    drawing.text(_MARGIN, 58, "   ·   ".join(figures), size=12, fill=FAINT)


def _stack(drawing: Drawing, cfg: RunConfig, layers: list[LayerGeometry], height: float) -> None:
    ends = 2 * (_END_HEIGHT + _END_GAP) + 18  # embedding below, output above, and the columns' names
    pitch = min(34.0, (height - ends) / len(layers))
    thickness = pitch - min(3.0, 0.22 * pitch)
    bottom = _TOP + (height + pitch * len(layers)) / 2 + 9  # of layer 1, the whole centred beside the cards
    stream = (_BAR_LEFT + _BAR_WIDTH + _STRIP_LEFT) / 2  # the residual stream, between the two columns
    width = _STRIP_LEFT + _STRIP_WIDTH - _BAR_LEFT
    top = bottom - pitch * len(layers)
    drawing.arrow((stream, bottom + _END_GAP), (stream, top - _END_GAP - 18))
    every = _label_every(layers, pitch)
    for layer in layers:
        y = bottom - pitch * layer.number + (pitch - thickness) / 2
        drawing.rect(_BAR_LEFT, y, _BAR_WIDTH, thickness, COLOURS[attention_kind(layer)])
        drawing.rect(_STRIP_LEFT, y, _STRIP_WIDTH, thickness, COLOURS[feed_forward_kind(layer)])
        clear_of_layer_1 = (layer.number - 1) * pitch >= 12
        if layer.number == 1 or (layer.number % every == 0 and clear_of_layer_1):
            drawing.text(_BAR_LEFT - 8, y + thickness / 2 + 3.5, str(layer.number), size=10, fill=FAINT, anchor="end")
    drawing.box(_BAR_LEFT, bottom + _END_GAP, width, _END_HEIGHT, f"embedding, {cfg.model.padded_vocab_size:,}")
    tied = "" if cfg.model.untie_embeddings_and_output_weights else ", tied"
    drawing.box(_BAR_LEFT, top - _END_GAP - 18 - _END_HEIGHT, width, _END_HEIGHT, f"RMSNorm, output layer{tied}")
    drawing.text(_BAR_LEFT + _BAR_WIDTH / 2, top - 6, "attention", size=10, fill=FAINT, anchor="middle")
    drawing.text(_STRIP_LEFT + _STRIP_WIDTH / 2, top - 6, "feed-fwd", size=10, fill=FAINT, anchor="middle")
    if cfg.model.value_residual:
        x, start = _STRIP_LEFT + _STRIP_WIDTH + 14, bottom - pitch / 2
        drawing.arrow((x - 10, start), (x, start), (x, top + pitch / 2), colour=LINE, dashed=True)
        if bottom - top > 150:
            drawing.text(
                x + 14, (bottom + top) / 2, "values of layer 1", size=10, fill=FAINT, anchor="middle", turned=True
            )


def _label_every(layers: list[LayerGeometry], pitch: float) -> int:
    """Label every n-th layer, the least that leaves room for a line of text; where some are global, of those."""
    kinds = [layer.is_global for layer in layers]
    if True in kinds and False in kinds:
        first = kinds.index(True) + 1
        return first * math.ceil(13 / (first * pitch))
    return next((step for step in (1, 2, 5, 10, 20, 50) if step * pitch >= 13), 100)
