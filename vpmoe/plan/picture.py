"""A plan as a picture: for each layout a bar of the step's seconds, stacked by what they are spent on."""

from __future__ import annotations

from pathlib import Path

from megatron_vpmoe.planning.layouts import Plan
from megatron_vpmoe.planning.predict import SPLIT
from vpmoe.plan.report import Figures
from vpmoe.steps import check_replaceable, plotting, save_picture

_COLOURS = {
    "compute": "#1f5a8c",
    "memory": "#8fbbdc",
    "launches": "#dd8a4f",
    "communication": "#b0413e",
    "waiting": "#c9c2b4",
}


def write_picture(plans: list[Plan], numbers: list[list[Figures]], path: Path, *, rows: int) -> None:
    """Draw the first ``rows`` layouts of each fleet, and the configuration's own; the suffix says the format.

    Raises:
        DataError: the file cannot be written, or has no such format.
        NotOursError: something else lies there.
    """
    check_replaceable(path)
    pyplot = plotting()

    bars = []
    for made, of_plan in zip(plans, numbers, strict=True):
        chosen = [pair for pair in zip(made.layouts, of_plan, strict=True) if pair[0].fits][:rows] or [
            *zip(made.layouts, of_plan, strict=True)
        ][:1]
        own = [pair for pair in zip(made.layouts, of_plan, strict=True) if pair[0].as_configured]
        bars += [(made, *pair) for pair in chosen + [pair for pair in own if pair not in chosen]]
    figure, axes = pyplot.subplots(figsize=(10, max(2.5, 1.2 + 0.36 * len(bars))), layout="constrained")
    names = [
        f"{made.fleet}: {each}{' (as configured)' * each.as_configured}{'' if each.fits else ' (does not fit)'}"
        for made, each, _ in bars
    ]
    left = [0.0] * len(bars)
    for key in SPLIT:
        widths = [each.prediction.split[key] for _, each, _ in bars]
        axes.barh(range(len(bars)), widths, 0.75, left=left, color=_COLOURS[key], label=key)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for number, (made, each, figures) in enumerate(bars):
        of_peak = "" if made.fleet.machine.is_cpu else f"{each.prediction.mfu_pct:.1f} % MFU, "
        axes.text(
            left[number],
            number,
            f" {of_peak}{figures.tokens_per_second_per_gpu:,.0f} tok/s/GPU",
            va="center",
            fontsize=8,
        )
    axes.set(xlabel="seconds a step, predicted", yticks=range(len(bars)), xlim=(0, 1.35 * max(left)))
    axes.set_yticklabels(names, fontsize=8)
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(SPLIT), frameon=False, fontsize=8)
    save_picture(figure, path)
