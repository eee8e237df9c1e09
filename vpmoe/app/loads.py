"""Loads of experts over a run, as charts and tables. Shapes: T steps, L layers with experts, E experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas
from numpy.typing import NDArray

from megatron_vpmoe.metrics.expert_loads import ExpertLoads

if TYPE_CHECKING:
    import altair

MOST_STEPS = 120
"""Records that are read of a run: cells of a heatmap side by side."""
MEASURES = {
    "maximal violation": lambda load: load.max(-1) - 1.0,
    "coefficient of variation, %": lambda load: 100.0 * load.std(-1),
    "dead experts": lambda load: (load <= 0).sum(-1),
}
"""Of a layer's loads [..., E], which are multiples of their mean: as :mod:`megatron_vpmoe.model.moe.router_health`."""


def measured(loads: ExpertLoads, measure: str) -> NDArray[np.float64]:
    """A measure of every layer at every step, float64 [T, L]."""
    return np.asarray(MEASURES[measure](loads.load_TLE.astype(np.float64)), dtype=np.float64)


def dead_experts(loads: ExpertLoads) -> list[dict[str, int]]:
    """Experts that got nothing in the last record: layer, expert, and since which step that has been so."""
    if not len(loads.steps):
        return []
    dead_TLE = loads.load_TLE <= 0
    rows = []
    for layer, expert in np.argwhere(dead_TLE[-1]).tolist():
        alive = np.flatnonzero(~dead_TLE[:, layer, expert])
        since = 0 if not len(alive) else int(alive[-1]) + 1
        rows.append(
            {"layer": loads.layers[layer], "expert": expert, "without tokens since step": int(loads.steps[since])}
        )
    return rows


def heatmap(
    value: NDArray[np.floating],
    across: Sequence[int],
    down: Sequence[int],
    *,
    across_title: str,
    down_title: str,
    value_title: str,
    balanced: bool,
) -> altair.Chart:
    """Cells of ``value`` [down, across]; ``balanced``: 1 is the middle of the colours, and 2 or more their end."""
    import altair

    rows, columns = np.meshgrid(np.arange(len(down)), np.arange(len(across)), indexing="ij")
    cells = pandas.DataFrame(
        {
            "across": np.asarray(across)[columns.ravel()],
            "down": np.asarray(down)[rows.ravel()],
            "value": np.asarray(value, dtype=np.float64).ravel(),
        }
    )
    scale = (
        altair.Scale(scheme="blueorange", domain=[0, 2], domainMid=1, clamp=True)
        if balanced
        else altair.Scale(scheme="viridis", zero=True)
    )
    every = max(1, len(across) // 12)
    down_every = max(1, len(down) // 16)
    return (
        altair.Chart(cells)
        .mark_rect()
        .encode(
            x=altair.X("across:O", title=across_title, axis=altair.Axis(values=list(across)[::every], labelAngle=0)),
            y=altair.Y(
                "down:O", title=down_title, axis=altair.Axis(values=list(down)[::down_every]), sort="descending"
            ),
            color=altair.Color("value:Q", title=value_title, scale=scale),
            tooltip=[
                altair.Tooltip("across:O", title=across_title),
                altair.Tooltip("down:O", title=down_title),
                altair.Tooltip("value:Q", title=value_title, format=".3f"),
            ],
        )
        .properties(height=90 + min(460, max(90, 22 * len(down))))
    )
