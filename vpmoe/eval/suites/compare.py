"""Which differences between two models exceed noise: a paired bootstrap on the items that both were asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vpmoe.errors import visible
from vpmoe.errors import DataError
from vpmoe.eval.suites import folded
from vpmoe.eval.suites.bootstrap import RESAMPLES, SEED, interval, resampled
from vpmoe.eval.suites.finished import Finished, Row
from vpmoe.eval.suites.suite_report import MEASURES, items_file

if TYPE_CHECKING:
    from rich.console import Console

_FREE = ("batch_size", "bf16", "samples", "texts", "dataset", "questions")
"""Settings that leave open what is asked: how it is computed, what is shown, and where the data lie (not what they
are)."""
_HEADINGS = ("task", "measure", "A", "B", "B - A", "95 %", "items", "differ", "B is")
_PARTS = ((1, 2, 3, 6), (4, 5, 7, 8))
FEWEST = 6
"""Items that have to differ: with fewer not even the exact sign test could tell at 5 %."""


@dataclass(frozen=True)
class Difference:
    """One number of a later report minus that of a former one.

    Attributes:
        value: the difference.
        interval: its 95 % percentile interval.
        n: items that both were asked.
        differing: those on which the two differ.
        better: 1 where more is better, -1 where less is.
    """

    value: float
    interval: tuple[float, float]
    n: int
    differing: int
    better: int

    @property
    def exceeds_noise(self) -> bool:
        """Whether the interval leaves out 0, and enough items differ."""
        low, high = self.interval
        return self.differing >= FEWEST and not low <= 0 <= high

    @property
    def verdict(self) -> str:
        """In a word."""
        if not self.exceeds_noise:
            return "noise"
        return "better" if self.value * self.better > 0 else "worse"


def differences(
    former: Finished, later: Finished, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Difference]:
    """Every number that both reports have, the later minus the former.

    Raises:
        DataError: they are not of the same items, or the items of one are damaged.
    """
    if fault := unlike(former, later):
        source = f"{former.path}, {later.path}"
        raise DataError(fault, source=source, remedy="evaluate both models with the same suite, settings and data")
    shared = {
        name: row for name, row in later.rows.items() if name in former.rows and former.rows[name].parts == row.parts
    }
    drawn: dict[tuple[str, str], np.ndarray] = {}
    differing: dict[tuple[str, str], int] = {}
    for task, measure in sorted({part[:2] for row in shared.values() for part in row.parts}):
        taken, items = MEASURES[measure], [*former.items[task]]
        pair = [taken.columns([report.items[task][item] for item in items]) for report in (former, later)]
        sums = resampled(np.concatenate(pair), task, resamples=resamples, seed=seed)
        drawn[task, measure] = taken.of(sums[:, 2:]) - taken.of(sums[:, :2])
        differing[task, measure] = int((pair[0] != pair[1]).any(0).sum())
    found = {}
    for name, row in shared.items():
        low, high = interval(np.sum([weight * drawn[task, measure] for task, measure, weight in row.parts], axis=0))
        differ = sum(differing[task, measure] for task, measure, _ in row.parts)
        items = sum(len(former.items[task]) for task, *_ in row.parts)
        found[name] = Difference(row.value - former.rows[name].value, (low, high), items, differ, row.better)
    return found


def unlike(former: Finished, later: Finished) -> str | None:
    """Why two reports cannot be held against each other item by item; None: they can."""
    if former.report.suite != later.report.suite:
        return f"one report is of {former.report.suite}, the other of {later.report.suite}"
    cut = any(entry.cut != 0 for one in (former, later) for entry in one.report.tasks.values())
    ours, theirs = (_asked(one, cut) for one in (former, later))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return f"settings.{name} differs: {ours.get(name)!r}, {theirs.get(name)!r}"
    tasks = [task for task in later.report.tasks if task in former.report.tasks]
    if not any(_of(former.rows, task) and _of(later.rows, task) for task in tasks):
        return "no task of one report is in the other"
    for task in tasks:
        one, other = ({**report.report.bundle.get(task, {}), "file": None} for report in (former, later))
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                told = f"{one.get(name)!r}, {other.get(name)!r}"
                return f"bundle.{task}.{name} differs: " + (
                    f"the items of {task} are others" if name == "sha256" else told
                )
    for report in (former, later):
        if not items_file(report.path).is_file():
            return f"no items beside {report.path}"
    for task in [task for task in tasks if task in former.items and task in later.items]:
        if strange := former.items[task].keys() ^ later.items[task].keys():
            first = min(strange, key=str)
            return f"{len(strange)} items of {task} are in one report only, such as {first!r}"
    return None


def _of(rows: Mapping[str, Row], task: str) -> bool:
    return any(part[0] == task for row in rows.values() for part in row.parts)


def _asked(finished: Finished, cut: bool) -> dict[str, Any]:
    """The settings that decide what is asked; where neither model had an item cut, the context decides nothing."""
    free = _FREE if cut else (*_FREE, "context")
    return {name: value for name, value in finished.report.settings.items() if name not in free}


def show(former: Finished, later: Finished, found: Mapping[str, Difference], console: Console) -> None:
    """Print a table of the differences, and what could not be compared."""
    from rich.text import Text

    rows = []
    for name, one in found.items():
        low, high = one.interval
        values = [f"{report.rows[name].value:.4f}" for report in (former, later)]
        cells = [name, later.rows[name].measure, *values, f"{one.value:+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
        rows.append(([*cells, str(one.n), str(one.differing), one.verdict], one.exceeds_noise))
    title = f"A: {former.label}\nB: {later.label}"
    folded.show(console, title, _HEADINGS, [folded.Group(None, rows)], parts=_PARTS, left=(0, 1))
    for label, report in (("A", former), ("B", later)):
        if alone := [name for name in report.rows if name not in found]:
            console.print(Text(visible(f"not compared, in {label} only: {', '.join(alone)}")), soft_wrap=True)
