"""Curves of runs as charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas

from vpmoe.app.shown import label

if TYPE_CHECKING:
    import altair

FIRST = (
    "loss/total",
    "valid/loss/total",
    "grad_norm",
    "lr",
    "throughput/tokens_per_second",
    "moe/router_agg/max_vio",
)
"""Tags that a page begins with, as far as a run has them."""
AXES = {"step": "step", "tokens": "tokens", "time": "seconds"}
_HEIGHT = 240


def first_tags(tags: Sequence[str]) -> list[str]:
    """Those of ``FIRST`` that are there; else as many others."""
    return [tag for tag in FIRST if tag in tags] or list(tags[: len(FIRST)])


def thinned(frame: pandas.DataFrame, points: int) -> pandas.DataFrame:
    """Of each curve about so many points, evenly, and its last: enough of one that is smooth."""
    curves = frame.groupby(["run", "tag"], sort=False)
    place, left = curves.cumcount().to_numpy(), curves.cumcount(ascending=False).to_numpy()
    each = -(-(place + left + 1) // points)
    return frame.loc[(place % each == 0) | (left == 0), :]


def not_finite(frame: pandas.DataFrame) -> int:
    """How many values are no finite number."""
    return int((~np.isfinite(frame["value"])).sum())


def chart(
    frame: pandas.DataFrame, tag: str, names: dict[str, str], *, by: str, log_x: bool, log_y: bool
) -> altair.Chart:
    """One tag of several runs.

    Args:
        frame: columns run, tag, x, value; finite numbers.
        tag: of it.
        names: id of a run -> what it is called.
        by: a key of ``AXES``.
        log_x: logarithmic; what is not above 0 has no place there and is left out.
        log_y: likewise.
    """
    import altair

    mine = frame.loc[frame["tag"] == tag, :]
    for column, is_log in (("x", log_x), ("value", log_y)):
        mine = mine.loc[mine[column] > 0, :] if is_log else mine
    drawn = pandas.DataFrame({"run": [names[one] for one in mine["run"]], "x": mine["x"], "value": mine["value"]})
    legend = None if len(names) == 1 else altair.Legend(orient="bottom", labelLimit=400, columns=2)
    scale: dict[bool, Any] = {True: altair.Scale(type="log", nice=False), False: altair.Scale(zero=False, nice=False)}
    return (
        altair.Chart(drawn, title=altair.Title(label(tag), anchor="start", fontSize=13))
        .mark_line(strokeWidth=1.5, point=len(drawn) <= 2 * len(names))
        .encode(
            x=altair.X("x:Q", title=AXES[by], scale=scale[log_x], axis=altair.Axis(format="~s")),
            y=altair.Y("value:Q", title=None, scale=scale[log_y]),
            color=altair.Color("run:N", title=None, sort=list(names.values()), legend=legend),
            tooltip=[
                altair.Tooltip("run:N"),
                altair.Tooltip("x:Q", title=AXES[by], format=",~r"),
                altair.Tooltip("value:Q", format=".5g"),
            ],
        )
        .properties(height=_HEIGHT)
    )
