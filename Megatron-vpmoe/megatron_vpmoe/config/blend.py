"""What a blend of datasets demands of its weights, and the weights as whole numbers.

Weights are ratios. They are taken exactly as written (0.7 is 7/10), so that a blend repeats after a cycle of whole
samples in which every dataset has its whole-number share: 0.7 and 0.3 repeat after ten samples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

from megatron_vpmoe.config.schema_run import DataSection

LONGEST_CYCLE = 10_000
"""Most samples after which the weights of a blend may repeat: four decimal digits."""


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of ``weights`` as they are written in decimal; one is above 0."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    common = math.gcd(*whole)
    return tuple(weight // common for weight in whole)


def blend_problems(data: DataSection) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every broken rule of ``data.{data_path, blend, blend_schedule}``: the fields, and what is wrong."""
    if data.blend is None:
        if data.data_path is None:
            yield ("data_path", "blend"), "neither is given; data_path names one dataset, blend several"
        if data.blend_schedule is not None:
            yield ("blend_schedule", "blend"), "a schedule of weights needs a blend"
        return
    if data.data_path is not None:
        yield ("data_path", "blend"), "both are given; with a blend set data_path to null"
    if not data.blend:
        yield ("blend",), "names no dataset; give a list of {path, weight}"
        return
    paths = [os.path.normpath(part.path) for part in data.blend]
    for path in _repeated(paths):
        yield ("blend",), f"the dataset {path} is listed twice; list it once with the sum of its weights"
    for name in _repeated([part.label for part in data.blend]):
        if len(set(paths)) == len(paths):
            yield ("blend",), f"two datasets are called {name}; tell them apart with name:"
    yield from _weight_problems(data)


def _weight_problems(data: DataSection) -> Iterator[tuple[tuple[str, ...], str]]:
    blend, schedule = data.blend or [], data.blend_schedule or []
    stages = [("blend", "", [part.weight for part in blend])]
    stages += [("blend_schedule", f"from sample {stage.from_sample}: ", stage.weights) for stage in schedule]
    for name, place, weights in stages:
        if len(weights) != len(blend):
            yield ("blend_schedule", "blend"), f"{place}{len(weights)} weights for {len(blend)} datasets"
        elif not any(weights):
            yield (name,), f"{place}every weight is 0, so nothing would be read"
        elif (cycle := sum(whole_weights(weights))) > LONGEST_CYCLE:
            yield (
                (name,),
                f"{place}weights {weights} repeat only after {cycle} samples, {LONGEST_CYCLE} is the most; round them "
                "to four digits that sum to a round number",
            )
    for number, part in enumerate(blend):
        if not any(number < len(weights) and weights[number] for _, _, weights in stages):
            yield ("blend",), f"the weight of {part.path} is never above 0; leave the dataset out"
    for before, after in pairwise(schedule):
        if after.from_sample <= before.from_sample:
            yield ("blend_schedule",), f"from_sample {after.from_sample} follows {before.from_sample}; list them rising"


def _repeated(values: list[str]) -> list[str]:
    return sorted({value for value in values if values.count(value) > 1})
