"""Finished reports and their items, read with care: what is wrong in one is told with its file and field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import BaseModel, Field, FiniteFloat, create_model

from megatron_vpmoe.files import read_json_lines
from vpmoe.errors import DataError
from vpmoe.eval.reports import read_report
from vpmoe.eval.suites.suite_report import KIND, MEASURES, SCHEMA_VERSION, items_file, of_task
from vpmoe.toml_file import validated

_REMEDY = "evaluate the model again, with --overwrite"
Bounds = tuple[FiniteFloat, FiniteFloat]
_NUMBERS: dict[str, Any] = {name: (Optional[FiniteFloat], None) for name in MEASURES}  # noqa: UP045
_NUMBERS |= {f"{name}_interval": (Bounds | None, None) for name in MEASURES}
Entry: Any = create_model(
    "Entry",
    n=(int | None, None),
    interval=(Bounds | None, None),
    chance=(FiniteFloat, Field(0.0, lt=1)),
    cut=(int | None, None),
    **_NUMBERS,
)
"""A task's numbers, as far as they are compared."""


class Checkpoint(BaseModel):
    """What was evaluated."""

    run: str
    iteration: int | None = None
    weights_sha256: str


class Mean(BaseModel):
    """A mean of centered accuracies."""

    tasks: list[str] = Field(min_length=1)
    value: FiniteFloat
    interval: Bounds | None


class Report(BaseModel):
    """What is read of a report."""

    schema_version: Literal[SCHEMA_VERSION]  # pyright: ignore[reportInvalidTypeForm]
    suite: str
    checkpoint: Checkpoint
    settings: dict[str, Any]
    bundle: dict[str, dict[str, Any]] = Field(default_factory=dict)
    tasks: dict[str, Entry] = Field(min_length=1)  # pyright: ignore[reportInvalidTypeForm]
    means: dict[str, Mean] = Field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A number of a report.

    Attributes:
        measure: what it measures.
        value: the number.
        interval: its 95 % interval; None: nobody can say.
        n: items that it is of.
        better: 1 where more is better, -1 where less is.
        parts: the task's measures, each with the weight that it has in the number.
    """

    measure: str
    value: float
    interval: Bounds | None
    n: int | None
    better: int
    parts: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Finished:
    """A report, where it lies."""

    path: Path
    report: Report

    @classmethod
    def read(cls, path: Path) -> Finished:
        """Raises :class:`DataError`: there is none, it is damaged, or of another kind; names file and field."""
        values = read_report(path, KIND)
        report = validated(Report, values, error=DataError, source=str(path), remedy=_REMEDY)
        for name, mean in report.means.items():
            if missing := [task for task in mean.tasks if task not in report.tasks]:
                raise DataError(
                    f"means.{name}.tasks: there is no task {missing[0]!r}", source=str(path), remedy=_REMEDY
                )
        return cls(path, report)

    @property
    def label(self) -> str:
        """The checkpoint in a few words."""
        checkpoint = self.report.checkpoint
        return checkpoint.run if checkpoint.iteration is None else f"{checkpoint.run}, step {checkpoint.iteration}"

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Its numbers: the first measure of a task by the task's name, another as ``task.measure``; then the means."""
        rows = {}
        for task, entry in self.report.tasks.items():
            found = [name for name in MEASURES if getattr(entry, name) is not None]
            for name in found:
                first = name == found[0]
                bounds = getattr(entry, f"{name}_interval") or (entry.interval if first else None)
                part = (task, name, 1.0)
                row = Row(name, getattr(entry, name), bounds, entry.n, MEASURES[name].better, (part,))
                rows[task if first else f"{task}.{name}"] = row
        for name, mean in self.report.means.items():
            of = [self.report.tasks[task] for task in mean.tasks]
            weights = [1 / len(of) / (1 - entry.chance) for entry in of]
            parts = tuple((task, "accuracy", weight) for task, weight in zip(mean.tasks, weights, strict=True))
            rows[name] = Row("centered", mean.value, mean.interval, sum(entry.n or 0 for entry in of), 1, parts)
        return rows

    @cached_property
    def items(self) -> dict[str, dict[Any, Mapping[str, Any]]]:
        """The items of each task that has a measure, by what is asked.

        Raises:
            DataError: there are none, or one is damaged or missing; names file and field.
        """
        path, lines = items_file(self.path), []
        seen = set()
        for number, line in read_json_lines(path):
            place = f"{path}:{number}"
            fault = _fault_of(line)
            if fault is None and (asked := (line["task"], line["item"])) in seen:
                fault = f"item {asked[1]!r} of {asked[0]} stands here a second time"
            if fault is not None:
                raise DataError(fault, source=place, remedy=_REMEDY)
            seen.add(asked)
            lines.append(line)
        return {
            task: self._items_of(task, lines) for task in {part[0] for row in self.rows.values() for part in row.parts}
        }

    def _items_of(self, task: str, lines: list[dict[str, Any]]) -> dict[Any, Mapping[str, Any]]:
        found, entry = of_task(task, lines), self.report.tasks[task]
        source = str(items_file(self.path))
        if len(found) != entry.n:
            fault = f"{len(found)} items of {task}, and the report counts {entry.n}"
            raise DataError(fault, source=source, remedy=_REMEDY)
        measures = [measure for name, measure in MEASURES.items() if getattr(entry, name) is not None]
        fields = {field for measure in measures for field in (measure.above, measure.below) if field is not None}
        for item, field in ((item, field) for item in found.values() for field in sorted(fields)):
            if not isinstance(item.get(field), int | float):
                fault = f"item {item['item']!r} of {task}: {field} = {item.get(field)!r} is no number"
                raise DataError(fault, source=source, remedy=_REMEDY)
        return found


def _fault_of(line: Any) -> str | None:
    """What is wrong with a line of the items; None: nothing."""
    if not isinstance(line, dict):
        return "the line is no item"
    for field, kinds in (("task", str), ("item", int | str)):
        if not isinstance(line.get(field), kinds):
            return f"{field} = {line.get(field)!r} names none"
    return None
