"""What a suite leaves behind: ``reports/eval/<suite>/<checkpoint>.json``, one form for all, and its items beside it.

A report has ``tasks``, each with ``n`` items and numbers by the names in ``MEASURES``. ``interval`` is the 95 %
interval of the first of them, ``<measure>_interval`` that of another. A line of the items has ``task``, ``item`` (what
is asked, the same for every model) and the fields that the measures sum. The items of a task ``all`` are those of all;
an item with a line in several tasks is one, its fields summed.
A suite may have ``means`` of tasks' centered accuracies, each with its tasks, ``value`` and ``interval``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.config import config_hash
from megatron_vpmoe.files import json_line, write_atomically
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.software import provenance
from vpmoe.errors import DataError
from vpmoe.eval.open_model import Opened
from vpmoe.eval.reports import check_reportable, write_report
from vpmoe.eval.suites.bootstrap import interval, resampled

KIND, SCHEMA_VERSION = "eval_suite", 1
ALL = "all"
_Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Measure:
    """A number of a task: the sum of a field over its items, by the sum of another or by their count.

    Attributes:
        above: field of an item; a flag counts as 0 or 1.
        below: field of an item; None: 1.
        scale: factor.
        better: 1 where more is better, -1 where less is.
    """

    above: str
    below: str | None = None
    scale: float = 1.0
    better: int = 1

    def columns(self, items: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The fields of each item: float64 [2, N]."""
        below = [1.0] * len(items) if self.below is None else [item[self.below] for item in items]
        return np.array([[item[self.above] for item in items], below], dtype=np.float64)

    def of(self, sums: np.ndarray) -> np.ndarray:
        """The number of each pair of sums [..., 2]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.scale * sums[..., 0] / sums[..., 1]


MEASURES = {
    "accuracy": Measure("correct"),
    "validity": Measure("valid"),
    "bits_per_byte": Measure("nats", "bytes", 1 / math.log(2), better=-1),
}
"""By their names in a task's entry; the first that an entry has is the one that the task is known by."""


def wilson(right: float, n: int) -> list[float]:
    """The 95 % interval of a share: Wilson's score interval (1927), which stays within 0 and 1 at any share."""
    share, spread = right / n, _Z * _Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def of_task(name: str, items: Iterable[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    """The items of a task, by what is asked."""
    if name != ALL:
        return {item["item"]: item for item in items if item["task"] == name}
    whole: dict[Any, Mapping[str, Any]] = {}
    for item in items:
        former = whole.get(item["item"])
        whole[item["item"]] = item if former is None else _summed(former, item)
    return whole


def _summed(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    fields = [name for name, value in one.items() if name != "item" and isinstance(value, int | float)]
    return {"item": one["item"], **{name: one[name] + other[name] for name in fields}}


def bootstrapped(measure: str, task: str, items: Iterable[Mapping[str, Any]]) -> list[float] | None:
    """The 95 % interval of a task's number that is no share; None: of one item nobody can say."""
    taken, mine = MEASURES[measure], [*of_task(task, items).values()]
    return interval(taken.of(resampled(taken.columns(mine), task))) if len(mine) > 1 else None


def centered(accuracy: Any, chance: float) -> Any:
    """An accuracy, or an array of them, so that guessing is 0 and perfection 1."""
    return (accuracy - chance) / (1 - chance)


def shares(right: int, n: int, chance: float = 0.0) -> dict[str, Any]:
    """A task's ``accuracy``, ``centered`` and ``n``, with their 95 % intervals."""
    interval = wilson(right, n)
    return {
        "accuracy": right / n,
        "centered": centered(right / n, chance),
        "n": n,
        "interval": interval,
        "centered_interval": [centered(bound, chance) for bound in interval],
    }


def means(
    of: Mapping[str, Sequence[str]], entries: Mapping[str, Mapping[str, Any]], items: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The means of a report whose tasks are all there, with 95 % intervals; and each one's value, else None, by name.

    The interval is None where a task has one item alone: what another one would give nobody can say.

    Args:
        of: the tasks of each mean.
        entries: of the tasks that were evaluated; with ``centered`` and ``chance``.
        items: of all of them.
    """
    accuracy, drawn = MEASURES["accuracy"], {}
    for name, entry in entries.items():
        columns = accuracy.columns([*of_task(name, items).values()])
        drawn[name] = centered(accuracy.of(resampled(columns, name)), entry["chance"])
    found = {
        name: {
            "tasks": list(tasks),
            "value": float(np.mean([entries[task]["centered"] for task in tasks])),
            "interval": interval(np.mean([drawn[task] for task in tasks], axis=0))
            if all(entries[task]["n"] > 1 for task in tasks)
            else None,
        }
        for name, tasks in of.items()
        if set(tasks) <= entries.keys()
    }
    return {**{name: found[name]["value"] if name in found else None for name in of}, "means": found}


def default_output(suite: str, opened: Opened) -> Path:
    """Where the report on a model lies; each checkpoint of a run has its own, and another with int8 weights."""
    name = opened.name if opened.iteration is None else f"{opened.name}_{opened.iteration:07d}"
    return Path("reports") / "eval" / suite / f"{name}{'_int8' if opened.int8 else ''}.json"


def items_file(output: Path) -> Path:
    """Beside a report: a line of JSON an item."""
    return output.with_suffix(".items.jsonl")


def check_writable(output: Path, *, overwrite: bool) -> None:
    """Refuse to replace a report before anything is computed for it.

    Raises:
        NotOursError: something else lies there.
        DataError: a report does, and ``overwrite`` does not allow for it.
    """
    check_reportable(output, KIND)
    if output.exists() and not overwrite:
        raise DataError(
            "here lies a finished report", source=str(output), remedy="--overwrite replaces it, --output names another"
        )


def output_for(suite: str, opened: Opened, output: Path | None, *, overwrite: bool) -> Path:
    """Where the report on an opened model goes, by default or as asked; a collective.

    Raises:
        NotOursError, DataError: see :func:`check_writable`; on all ranks.
    """
    chosen = output or default_output(suite, opened)
    distributed.from_rank_0(lambda: check_writable(chosen, overwrite=overwrite))
    return chosen


def head(suite: str, opened: Opened, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What every report begins with: what it is, of which weights, by which code, with which settings."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "suite": suite,
        "checkpoint": opened.entry,
        "provenance": provenance(
            config_hash=config_hash(opened.trained or opened.cfg),
            tokenizer=opened.tokenizer.identity,
            dataset=opened.dataset,
        ),
        "machine": {"device": str(opened.model.device), "processes": distributed.world_size()},
        "settings": dict(settings),
    }


def write(output: Path, report: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> None:
    """Write the items, then the report; by rank 0 alone."""

    def both() -> None:
        write_atomically(items_file(output), "".join(map(json_line, items)).encode())
        write_report(output, dict(report))

    distributed.from_rank_0(both)
