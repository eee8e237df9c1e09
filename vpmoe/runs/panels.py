"""The figures of a training by name, and what their panels show."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vpmoe.errors import DataError


@dataclass(frozen=True)
class Curve:
    """One metric in a panel.

    Attributes:
        tag: of the metric; in ``FIGURES`` a glob.
        label: what it is called beside others of its panel.
        style: of the line, as matplotlib has it.
        is_sparse: its points are few: each is marked, and none smoothed.
    """

    tag: str
    label: str = ""
    style: str = "-"
    is_sparse: bool = False


@dataclass(frozen=True)
class Panel:
    """One field of a picture.

    Attributes:
        title: above it.
        curves: each of which every run has a line of.
        minus: a tag that is taken off each curve: at each of its points the last value recorded up to there.
    """

    title: str
    curves: tuple[Curve, ...]
    minus: str | None = None

    @property
    def tags(self) -> list[str]:
        """All that it is made of."""
        return [*(curve.tag for curve in self.curves), *([] if self.minus is None else [self.minus])]


_VALID = Curve("valid*loss/total", "valid", "--", is_sparse=True)
_LOSS = Panel("loss", (Curve("loss/total", "train"), _VALID))
_RATE = Panel("learning rate", (Curve("lr"),))
_GRADIENT = Panel("gradient norm", (Curve("grad_norm"),))
_SPEED = Panel("tokens/s", (Curve("throughput/tokens_per_second"),))
_GAP = Panel("loss, valid minus train", (replace(_VALID, label=""),), minus="loss/total")
_LOAD = Panel(
    "load of the busiest expert, % of its layer",
    (
        Curve("moe/router_agg/max_load_pct", "worst layer"),
        Curve("moe/router_agg/mean_max_load_pct", "mean over layers", "--"),
    ),
)

FIGURES: dict[str, tuple[Panel, ...]] = {
    "training_summary": (_LOSS, _RATE, _GRADIENT, _SPEED),
    "gradient_norm": (_GRADIENT,),
    "learning_rate": (_RATE,),
    "train_valid_gap": (_GAP,),
    "max_load": (_LOAD,),
}
"""Panels of each figure; a metric that was not recorded is left out."""


def of_tags(tags: Sequence[str]) -> list[Panel]:
    """A panel for each metric."""
    return [Panel(tag, (Curve(tag),)) for tag in tags]


def of_figure(name: str, there: Sequence[str]) -> list[Panel]:
    """The panels of a figure, their globs as the tags that they match; none where nothing of it was recorded.

    Args:
        name: one of ``FIGURES``.
        there: recorded tags.
    """
    panels = []
    for panel in FIGURES[name]:
        found = [(curve, fnmatch.filter(there, curve.tag)) for curve in panel.curves]
        curves = [
            replace(curve, tag=tag, label=curve.label if len(tags) == 1 else tag)
            for curve, tags in found
            for tag in tags
        ]
        if curves and panel.minus in (None, *there):
            panels.append(replace(panel, curves=tuple(curves)))
    return panels


def of_figures(names: Sequence[str], there: Sequence[str]) -> list[Panel]:
    """The panels of several figures, each once.

    Raises:
        DataError: there is nothing to show of one.
    """
    panels: dict[Panel, None] = {}
    for name in names:
        if not (found := of_figure(name, there)):
            wanted = ", ".join(curve.tag for panel in FIGURES[name] for curve in panel.curves)
            raise DataError(
                f"no run has recorded {wanted}",
                source=f"--figure {name}",
                remedy="leave it out; valid losses come of training.eval_interval, router metrics of experts",
            )
        panels |= dict.fromkeys(found)
    return list(panels)
