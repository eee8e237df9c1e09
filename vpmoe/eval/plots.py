"""One picture of a run: loss per span, how evenly the router spreads tokens, and what share of answers is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpmoe.errors import DataError
from vpmoe.steps import plotting, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Mapping[str, Sequence[tuple[int, float]]]

_SPANS = {"analysis": "tab:blue", "final": "tab:orange"}
_WHOLE = {"total": "tab:blue"}
ROUTER_TAG = "moe/router_agg/mean_cv_pct"
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
