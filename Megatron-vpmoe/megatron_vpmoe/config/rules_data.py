"""Rules of the data: one dataset or a blend, and the weights of a blend."""

from __future__ import annotations

import os
from itertools import pairwise

from megatron_vpmoe.config.rule import Facts, Rule
from megatron_vpmoe.config.schema import RunConfig


def _weights(cfg: RunConfig) -> list[tuple[str, list[float]]]:
    """(where, weights) of a blend and of each change of them."""
    changes = cfg.data.blend_schedule or [] if cfg.data.blend else []
    first = [("", [part.weight for part in cfg.data.blend])] if cfg.data.blend else []
    return first + [(f"from sample {change.from_sample}: ", change.weights) for change in changes]


def _twice(values: list[str]) -> list[str]:
    return sorted({value for value in values if values.count(value) > 1})


def _paths(cfg: RunConfig) -> list[str]:
    return [os.path.normpath(part.path) for part in cfg.data.blend or ()]


def _same_names(cfg: RunConfig) -> list[Facts]:
    names = [] if _twice(_paths(cfg)) else [part.label for part in cfg.data.blend or ()]
    return [{"dataset": name} for name in _twice(names)]


def _never_read(cfg: RunConfig) -> list[Facts]:
    return [
        {"dataset": part.path}
        for number, part in enumerate(cfg.data.blend or ())
        if not any(number < len(weights) and weights[number] for _, weights in _weights(cfg))
    ]


REFUSED: tuple[Rule, ...] = (
    Rule(
        ("data_path", "blend"),
        "neither is given; data_path names one dataset, blend several",
        lambda c: c.data.blend is None and c.data.data_path is None,
    ),
    Rule(
        ("data_path", "blend"),
        "both are given; with a blend set data_path to null",
        lambda c: c.data.blend is not None and c.data.data_path is not None,
    ),
    Rule(
        ("blend_schedule", "blend"),
        "a schedule of weights needs a blend",
        lambda c: c.data.blend is None and c.data.blend_schedule is not None,
    ),
    Rule(("blend",), "names no dataset; give a list of {{path, weight}}", lambda c: c.data.blend == []),
    Rule(
        ("blend",),
        "the dataset {path} is listed twice; list it once with the sum of its weights",
        lambda c: [{"path": path} for path in _twice(_paths(c))],
    ),
    Rule(("blend",), "two datasets are called {dataset}; tell them apart with name:", _same_names),
    Rule(
        ("blend_schedule", "blend"),
        "{maybe_where}{count} weights for {datasets} datasets",
        lambda c: [
            {"maybe_where": where, "count": len(weights), "datasets": len(c.data.blend or ())}
            for where, weights in _weights(c)
            if len(weights) != len(c.data.blend or ())
        ],
    ),
    Rule(
        ("blend", "blend_schedule"),
        "{maybe_where}every weight is 0, so nothing would be read",
        lambda c: [{"maybe_where": where} for where, weights in _weights(c) if weights and not any(weights)],
    ),
    Rule(
        ("blend",),
        "the weight of {dataset} is never above 0; leave the dataset out",
        _never_read,
    ),
    Rule(
        ("blend_schedule",),
        "from_sample {after} follows {before}; list them rising",
        lambda c: [
            {"after": after.from_sample, "before": before.from_sample}
            for before, after in pairwise(c.data.blend_schedule or ())
            if c.data.blend and after.from_sample <= before.from_sample
        ],
    ),
)
"""What a blend of datasets demands of its paths and weights."""
