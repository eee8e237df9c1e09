"""The stack as a picture: a bar for each layer's attention and one for its feed-forward part, from bottom to top."""

from __future__ import annotations

from pathlib import Path

from megatron_vpmoe.config import LayerGeometry, RunConfig, layer_geometries, parameter_count
from vpmoe.describe.layers import POSITION_NAMES, amount, attention_words, feed_forward_words, kind_words
from vpmoe.steps import check_replaceable, plotting, save_picture

_COLOURS = {False: ("#8fbbdc", "#1f5a8c"), True: ("#c9c2b4", "#dd8a4f")}
"""Of attention (local, global) and of feed-forward layers (dense, experts)."""


def columns(cfg: RunConfig) -> list[list[tuple[str, str]]]:
    """Colour and words of each layer, from the first on: of its attention, and of its feed-forward part."""

    def attention(layer: LayerGeometry) -> tuple[str, str]:
        words = f"{kind_words(layer)}, {attention_words(cfg, layer)}, {POSITION_NAMES[layer.position]}"
        return _COLOURS[False][layer.is_global], f"{words}: {layer.cache_bytes:,} B KV a token"

    def feed_forward(layer: LayerGeometry) -> tuple[str, str]:
        words = f"{feed_forward_words(cfg, layer)}: {amount(layer.feed_forward_parameters)} parameters"
        return _COLOURS[True][layer.sparse], words

    layers = layer_geometries(cfg)
    return [[attention(layer) for layer in layers], [feed_forward(layer) for layer in layers]]


def write_picture(cfg: RunConfig, path: Path) -> None:
    """Draw the stack that ``cfg`` describes; the suffix says the format, such as .svg or .png.

    Raises:
        DataError: the file cannot be written, or has no such format.
        NotOursError: something else lies there.
    """
    check_replaceable(path)
    pyplot = plotting()

    count, both = parameter_count(cfg), columns(cfg)
    layers = len(both[0])
    figure, axes = pyplot.subplots(figsize=(8, max(3.0, 1.5 + 0.07 * layers)), layout="constrained")
    for place, column in enumerate(both):
        for kind in dict.fromkeys(column):
            numbers = [number for number, own in enumerate(column, 1) if own == kind]
            axes.barh(numbers, 0.9, 0.8, left=place, color=kind[0], label=kind[1])
    size = f"{amount(count.total)} parameters, {amount(count.active)} active"
    figure.suptitle(f"{layers} layers of width {cfg.model.hidden_size}: {size}", fontsize=11)
    axes.set(
        ylabel="layer",
        xticks=(0.45, 1.45),
        xticklabels=("attention", "feed-forward"),
        xlim=(-0.05, 1.95),
        ylim=(0.4, layers + 0.6),
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_picture(figure, path)
