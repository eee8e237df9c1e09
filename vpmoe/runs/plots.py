"""Curves of several runs as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.errors import visible
from vpmoe.errors import DataError
from vpmoe.runs.queries import series, smoothed
from vpmoe.runs.registry import RunEntry, labels
from vpmoe.steps import check_replaceable, plotting, save_picture

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_COLUMNS = 3
_LONGEST_LEGEND = 12
AXIS_LABELS = {"step": "step", "tokens": "tokens", "time": "seconds"}


def plot(
    runs: Sequence[RunEntry],
    tags: Sequence[str],
    output: Path,
    *,
    by: str = "step",
    smoothing: float = 0.0,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draw each tag into a field of its own, a line a run; the picture appears whole or not at all.

    Args:
        runs: to draw.
        tags: exact.
        output: PNG, SVG or PDF, by its suffix.
        by: as for ``queries.series``.
        smoothing: weight of what came before, 0 to below 1; the curve itself stays, pale.
        log_x: a logarithmic axis; points that are not above 0 are left out.
        log_y: likewise.

    Raises:
        NotOursError: something else than a picture of ours lies there.
        DataError: no run has a point, or the picture cannot be written.
    """
    check_replaceable(output)
    # Smoothed over every record: what a thinned curve keeps are its extremes.
    curves = series(runs, tags, by=by, points=2**31 if smoothing else 4000)
    if curves.empty:
        lacking = "" if by == "step" else f"; older runs record no {by}, --by step works for all"
        raise DataError(
            f"nothing to draw over {by}", source=", ".join(run.id for run in runs), remedy=f"train{lacking}"
        )
    pyplot = plotting()
    rows, columns = -(-len(tags) // _COLUMNS), min(len(tags), _COLUMNS)
    figure, fields = pyplot.subplots(
        rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False, layout="constrained"
    )
    for number, field in enumerate(fields.flat):
        if number >= len(tags):
            field.set_axis_off()
            continue
        of_tag = curves.loc[curves["tag"] == tags[number]]
        _draw(field, runs, of_tag, smoothed(of_tag, smoothing) if smoothing else None)
        field.set_title(visible(tags[number]), parse_math=False)
        field.set(xlabel=AXIS_LABELS[by], **_scales(log_x, log_y))
        if 1 < len(runs) <= _LONGEST_LEGEND or number == 0:
            field.legend(frameon=False, fontsize=7)
    save_picture(figure, output)


def _scales(log_x: bool, log_y: bool) -> dict[str, Any]:
    return {**({"xscale": "log"} if log_x else {}), **({"yscale": "log"} if log_y else {})}


def _draw(field: Axes, runs: Sequence[RunEntry], curves: pandas.DataFrame, smooth: pandas.DataFrame | None) -> None:
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        colour = f"C{number % 10}"
        own = curves[curves["run"] == run.id]
        if own.empty:
            continue
        marker = "o" if len(own) == 1 else None
        # Neither a formula, nor with a leading "_", which would leave it out of the legend.
        name = " " * label.startswith("_") + visible(label).replace("$", r"\$")
        if smooth is None:
            field.plot(own["x"], own["value"], color=colour, linewidth=1.2, marker=marker, label=name)
            continue
        field.plot(own["x"], own["value"], color=colour, linewidth=0.8, alpha=0.25, marker=marker)
        mean = smooth[smooth["run"] == run.id]
        field.plot(mean["x"], mean["value"], color=colour, linewidth=1.4, marker=marker, label=name)
