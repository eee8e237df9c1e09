"""Pictures of a run (loss per span, how evenly the router spreads tokens, what share of answers is right) and of what
models do over many prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vpmoe.errors import DataError
from vpmoe.steps import as_label, plotting, save_figure, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vpmoe.eval.over_prompts import OverPrompts

Curves = Mapping[str, Sequence[tuple[int, float]]]

_SPANS = {"analysis": "tab:blue", "final": "tab:orange"}
_WHOLE = {"total": "tab:blue"}
ROUTER_TAG = "moe/router_agg/mean_cv_pct"
_WRITTEN = 160
"""Cells of a heatmap whose numbers are written into them, at most."""
_ON_COLOUR: dict[str, Any] = {
    "bbox": {"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.75, "linewidth": 0}
}
_WHERE = {"-": {"linewidth": 1.2}, "o": {"linestyle": "none", "marker": "o", "markersize": 4}}


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every tag of a ``metrics.jsonl`` with its ``(step, value)`` in order.

    Raises:
        DataError: no such file, or not one of records.
    """
    from megatron_vpmoe.metrics.jsonl import read_records

    if not path.is_file():
        raise DataError("the run has no metrics", source=str(path), remedy="train it: vpmoe train CONFIG")
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(path):
        curves.setdefault(record.tag, []).append((record.step, record.value))
    return curves


def plot_run(curves: Curves, tasks: Mapping[str, Any], output: Path, *, title: str) -> None:
    """Draw losses, router balance and accuracy side by side into a PNG, which appears whole or not at all.

    Args:
        curves: as :func:`read_curves` gives them; a tag that is absent (a dense run has no router) is left out.
        tasks: as :func:`vpmoe.eval.scoring.summarize` gives them.
        output: the PNG.
        title: over the whole picture.
    """
    pyplot = plotting()

    figure, (losses, router, answers) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    figure.suptitle(title)
    _plot_losses(losses, curves)
    _plot_router(router, curves)
    _plot_answers(answers, tasks)
    save_figure(figure, output, dpi=110)


def _plot_losses(axes: Axes, curves: Curves) -> None:
    spans = any(f"loss/{name}" in curves for name in _SPANS)
    for name, colour in (_SPANS if spans else _WHOLE).items():
        for tag, label, style in ((f"loss/{name}", "train", "-"), (f"valid/loss/{name}", "valid", "o")):
            if points := curves.get(tag):
                axes.plot(*zip(*points, strict=True), color=colour, label=f"{name}, {label}", **_WHERE[style])
    axes.set(
        title="cross-entropy per span" if spans else "cross-entropy",
        xlabel="step",
        ylabel="nats per token",
        yscale="log",
    )
    _legend(axes)


def _plot_router(axes: Axes, curves: Curves) -> None:
    if points := curves.get(ROUTER_TAG):
        axes.plot(*zip(*points, strict=True), color="tab:green", linewidth=1.2, label="mean over layers")
    axes.set(title="load of the experts", xlabel="step", ylabel="coefficient of variation, %")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _plot_answers(axes: Axes, tasks: Mapping[str, Any]) -> None:
    places = range(len(tasks))
    for offset, key, label, colour in (
        (-0.2, "validity", "valid Harmony", "0.75"),
        (0.2, "accuracy", "exact", "tab:blue"),
    ):
        heights = [100 * entry[key] for entry in tasks.values()]
        bars = axes.bar([place + offset for place in places], heights, 0.4, label=label, color=colour)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    labels = [f"{name}\n(n={entry['n']})" for name, entry in tasks.items()]
    axes.set_xticks(list(places), labels, rotation=30, ha="right", fontsize=8)
    axes.set(title="held-out questions, greedy", ylabel="%", ylim=(0, 125))
    _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def along(
    axes: Axes, names: Sequence[str], values: Sequence[float], intervals: Sequence[tuple[float, float] | None]
) -> None:
    """Draw a number over what stands in a row, checkpoints or rungs, each with its value and its interval, if any."""
    places = range(len(values))
    axes.plot(places, values, color="tab:blue", marker="o", markersize=4, linewidth=1.2)
    for place, value, interval in zip(places, values, intervals, strict=True):
        if interval is not None:
            axes.vlines(place, *interval, color="tab:blue", alpha=0.4, linewidth=3)
        axes.annotate(
            f"{value:.3g}", (place, value), fontsize=7, xytext=(0, 7), textcoords="offset points", ha="center"
        )
    axes.set_xticks(places, [name.replace("$", r"\$") for name in names], rotation=40, ha="right", fontsize=7)
    axes.margins(x=0.15, y=0.25)


def plot_throughput(models: Mapping[str, OverPrompts], output: Path) -> None:
    """Draw the tokens a second of each model with its KV cache and without: the mean over prompts and the spread."""
    figure, axes = plotting().subplots(figsize=(2.5 + 2.2 * len(models), 4.2), layout="constrained")
    for offset, cache, colour in ((-0.2, "on", "tab:blue"), (0.2, "off", "0.75")):
        rates = [one.rate[cache] for one in models.values()]
        places = [place + offset for place in range(len(models))]
        means, spreads = ([float(of(rate)) for rate in rates] for of in (np.mean, np.std))
        bars = axes.bar(places, means, 0.4, yerr=spreads, capsize=3, label=f"KV cache {cache}", color=colour)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.set_xticks(range(len(models)), [*map(as_label, models)])
    axes.set(title=_over("greedy decoding", models), ylabel="tokens/s")
    axes.margins(y=0.15)
    _legend(axes)
    save_picture(figure, output)


def plot_usage(models: Mapping[str, OverPrompts], output: Path) -> None:
    """Draw what share of its tokens each expert of each layer gets: the mean over prompts and, below, the spread.

    1 is as much as if all got the same.
    """
    from matplotlib.colors import TwoSlopeNorm

    figure, fields = plotting().subplots(
        2, len(models), figsize=(1.5 + 4.5 * len(models), 8), squeeze=False, layout="constrained"
    )
    figure.suptitle(_over("share of an expert, in multiples of the even share", models))
    multiples = [one.usage * one.usage.shape[-1] for one in models.values()]
    widest = max(float(multiple.std(0).max()) for multiple in multiples) or 1.0
    looks = ({"cmap": "PuOr_r", "norm": TwoSlopeNorm(1.0, 0.0, 2.0)}, {"cmap": "viridis", "vmin": 0, "vmax": widest})
    for column, (name, one) in enumerate(zip(map(as_label, models), models.values(), strict=True)):
        multiple = multiples[column]
        values = (("mean", multiple.mean(0)), ("standard deviation", multiple.std(0)))
        for axes, (what, value), look in zip(fields[:, column], values, looks, strict=True):
            image = axes.imshow(value, aspect="auto", interpolation="nearest", **look)
            axes.set(title=f"{name}: {what}", xlabel="expert", ylabel="layer")
            every = -(-len(one.layers) // 16)
            axes.set_yticks(range(0, len(one.layers), every), one.layers[::every])
            axes.xaxis.get_major_locator().set_params(integer=True)
            if value.size <= _WRITTEN:
                for (layer, expert), share in np.ndenumerate(value):
                    axes.text(expert, layer, f"{share:.2f}", ha="center", va="center", fontsize=8, **_ON_COLOUR)
            figure.colorbar(image, ax=axes, extend="max" if what == "mean" else "neither")
    save_picture(figure, output)


def plot_first_choice(models: Mapping[str, OverPrompts], output: Path) -> None:
    """Draw the share of a token's heaviest expert in its mixing weights by layer: the mean over prompts, spread around.

    The dotted line is where all of a token's experts weigh the same.
    """
    figure, axes = plotting().subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, one) in enumerate(zip(map(as_label, models), models.values(), strict=True)):
        mean, spread, colour = one.first_choice.mean(0), one.first_choice.std(0), f"C{number % 10}"
        axes.plot(one.layers, mean, color=colour, marker="o", markersize=4, linewidth=1.2, label=name)
        axes.fill_between(one.layers, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(1 / one.topk, color=colour, linestyle=":", linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=_over("weight of the first choice", models), xlabel="layer", ylabel="share of a token's weights")
    _legend(axes)
    save_picture(figure, output)


def _over(what: str, models: Mapping[str, OverPrompts]) -> str:
    counts = {len(one.tokens) for one in models.values()}
    return f"{what}; {' or '.join(map(str, sorted(counts)))} prompts"
