"""Curves of several runs as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.errors import visible
from vpmoe.errors import DataError
from vpmoe.runs.panels import Curve, Panel
from vpmoe.runs.queries import series, smoothed
from vpmoe.runs.registry import RunEntry, labels
from vpmoe.steps import as_label, check_replaceable, plotting, save_picture

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_COLUMNS = 3
_LONGEST_LEGEND = 12
AXIS_LABELS = {"step": "step", "tokens": "tokens", "time": "seconds"}


def plot(
    runs: Sequence[RunEntry],
    panels: Sequence[Panel],
    output: Path,
    *,
    by: str = "step",
    smoothing: float = 0.0,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draw each panel into a field of its own, a colour a run; the picture appears whole or not at all.

    Args:
        runs: to draw.
        panels: of exact tags.
        output: PNG, SVG or PDF, by its suffix.
        by: as for ``queries.series``.
        smoothing: weight of what came before, 0 to below 1; the curve itself stays, pale. Where a curve is taken off
            another, it is the one that is smoothed.
        log_x: a logarithmic axis; points that are not above 0 are left out.
        log_y: likewise.

    Raises:
        NotOursError: something else than a picture of ours lies there.
        DataError: no run has a point, or the picture cannot be written.
    """
    check_replaceable(output)
    tags = dict.fromkeys(tag for panel in panels for tag in panel.tags)
    # Smoothed, or taken off others, over every record: what a thinned curve keeps are its extremes.
    whole = smoothing or any(panel.minus for panel in panels)
    curves = series(runs, list(tags), by=by, points=2**31 if whole else 4000)
    if curves.empty:
        lacking = "" if by == "step" else f"; older runs record no {by}, --by step works for all"
        raise DataError(
            f"nothing to draw over {by}", source=", ".join(run.id for run in runs), remedy=f"train{lacking}"
        )
    pyplot = plotting()
    columns = 2 if len(panels) == 4 else min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure, fields = pyplot.subplots(
        rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False, layout="constrained"
    )
    smooth = smoothed(curves, smoothing) if smoothing else None
    for number, field in enumerate(fields.flat):
        if number >= len(panels):
            field.set_axis_off()
            continue
        panel = panels[number]
        for curve in panel.curves:
            points, mean = _points(curves, curve, panel, curves), None
            if smooth is not None and panel.minus is not None:
                mean = _points(curves, curve, panel, smooth)
            elif smooth is not None and not curve.is_sparse:
                mean = _points(smooth, curve, panel, smooth)
            _draw(field, runs, curve, points, mean)
        if panel.minus is not None:
            field.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        field.set_title(visible(panel.title), parse_math=False)
        field.set(xlabel=AXIS_LABELS[by], **_scales(log_x, log_y))
        lines = len(field.get_legend_handles_labels()[0])
        if 1 < lines <= _LONGEST_LEGEND or number == 0:
            field.legend(frameon=False, fontsize=7)
    save_picture(figure, output)


def _points(drawn: pandas.DataFrame, curve: Curve, panel: Panel, taken_off: pandas.DataFrame) -> pandas.DataFrame:
    """The points of a curve: columns run, x and value."""
    import pandas

    own = drawn.loc[drawn["tag"] == curve.tag, ["run", "x", "value"]]
    if panel.minus is None:
        return own
    other = taken_off.loc[taken_off["tag"] == panel.minus, ["run", "x", "value"]]
    both = pandas.merge_asof(own.sort_values("x"), other.sort_values("x"), on="x", by="run", suffixes=("", "_off"))
    return both.assign(value=both["value"] - both["value_off"]).dropna(subset="value_off")


def _scales(log_x: bool, log_y: bool) -> dict[str, Any]:
    return {**({"xscale": "log"} if log_x else {}), **({"yscale": "log"} if log_y else {})}


def _draw(
    field: Axes, runs: Sequence[RunEntry], curve: Curve, points: pandas.DataFrame, smooth: pandas.DataFrame | None
) -> None:
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        colour = f"C{number % 10}"
        own = points[points["run"] == run.id]
        if own.empty:
            continue
        marker = "o" if curve.is_sparse or len(own) == 1 else None
        look: dict[str, Any] = {"color": colour, "linestyle": curve.style, "marker": marker, "markersize": 4}
        name = as_label(", ".join(filter(None, (label, curve.label))))
        if smooth is None:
            field.plot(own["x"], own["value"], linewidth=1.2, label=name, **look)
            continue
        field.plot(own["x"], own["value"], linewidth=0.8, alpha=0.25, **look)
        mean = smooth[smooth["run"] == run.id]
        field.plot(mean["x"], mean["value"], linewidth=1.4, label=name, **look)
