"""All reports of all suites in one view: a table on the terminal, in Markdown and HTML, and a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vpmoe.errors import visible
from megatron_vpmoe.files import read_json, write_atomically
from vpmoe.errors import DataError
from vpmoe.eval.plots import along
from vpmoe.eval.reports import markdown_table
from vpmoe.eval.suites import folded
from vpmoe.eval.suites.compare import Difference, differences, unlike
from vpmoe.eval.suites.finished import Bounds, Finished, Row
from vpmoe.eval.suites.folded import Group
from vpmoe.eval.suites.suite_report import KIND
from vpmoe.steps import MARK, check_replaceable, plotting, save_figure, save_page

if TYPE_CHECKING:
    from rich.console import Console

_HEADINGS = ("task", "measure", "checkpoint", "n", "value", "95 %", "Δ", "95 % of Δ", "Δ is")
_SHOWN = ("number of", *_HEADINGS[3:])
_PARTS = (range(1, 4), range(4, 7))
_NAMES = ("report.md", "report.html", "report.png")
_PAGE_WIDTH, _COLUMNS = 140, 4
_UNPAIRED = "not paired"


@dataclass(frozen=True)
class Line:
    """A number of a report beside that of the former one.

    Attributes:
        suite, name: of what.
        label: the checkpoint.
        row: the number.
        former: of the report before that has it; None: there is none.
        difference: None: there is no former one, or no pairing with it.
    """

    suite: str
    name: str
    label: str
    row: Row
    former: Row | None
    difference: Difference | None

    @property
    def cells(self) -> list[str]:
        """By the headings."""
        row = self.row
        cells = [self.name, row.measure, self.label, str(row.n or ""), f"{row.value:.4f}", _bounds(row.interval)]
        if self.former is None:
            return [*map(visible, cells), "", "", ""]
        delta = f"{self.row.value - self.former.value:+.4f}"
        if self.difference is None:
            return [*map(visible, cells), delta, "", _UNPAIRED]
        return [*map(visible, cells), delta, _bounds(self.difference.interval, "+"), self.difference.verdict]


@dataclass(frozen=True)
class Overview:
    """Reports, in the order in which they are held against each other.

    Attributes:
        lines: by suite, number and report.
        notes: what could not be paired, and why.
    """

    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, reports: Sequence[Finished]) -> Overview:
        """Raises :class:`DataError` where the items of a report are damaged."""
        lines: list[Line] = []
        notes: dict[str, None] = {}
        for suite in dict.fromkeys(one.report.suite for one in reports):
            mine = [one for one in reports if one.report.suite == suite]
            labels = _labels(mine)
            pairs: dict[tuple[int, int], dict[str, Difference]] = {}
            for name in dict.fromkeys(name for one in mine for name in one.rows):
                former: int | None = None
                for place, one in enumerate(mine):
                    if name not in one.rows:
                        continue
                    if former is not None and (former, place) not in pairs:
                        if fault := unlike(mine[former], one):
                            notes[f"{labels[place]} and {labels[former]}, {suite}: {_UNPAIRED}: {fault}"] = None
                        pairs[former, place] = {} if fault else differences(mine[former], one)
                    before = None if former is None else mine[former].rows[name]
                    difference = None if former is None else pairs[former, place].get(name)
                    if former is not None and before is not None and before.parts != one.rows[name].parts:
                        told = f"{labels[place]} and {labels[former]}, {suite}: {name} is of other tasks or chances"
                        before, notes[told] = None, None
                    lines.append(Line(suite, name, labels[place], one.rows[name], before, difference))
                    former = place
        return cls(tuple(lines), tuple(notes))

    def show(self, console: Console) -> None:
        """Print a table a suite; on a narrow console two, the numbers and what changed."""
        from rich.text import Text

        for suite, lines in groupby(self.lines, lambda line: line.suite):
            named = groupby(lines, lambda line: line.name)
            groups = [_group(name, list(some)) for name, some in named]
            folded.show(console, suite, _SHOWN, groups, parts=_PARTS, left=(0, len(_SHOWN) - 1))
        for note in self.notes:
            console.print(Text(visible(note)), soft_wrap=True)

    def markdown(self) -> str:
        """The same as Markdown."""
        parts = [f"<!-- {MARK} -->"]
        for suite, lines in groupby(self.lines, lambda line: line.suite):
            parts.append(f"## {visible(suite)}\n\n{markdown_table(_HEADINGS, [line.cells for line in lines])}")
        parts += [f"- {visible(note)}" for note in self.notes]
        return "\n\n".join(parts) + "\n"

    def plot(self, output: Path) -> None:
        """Draw each task's number over the checkpoints, with its 95 % interval, into a PNG."""
        pyplot = plotting()

        drawn = [
            (suite, name, list(lines))
            for (suite, name), lines in groupby(self.lines, lambda line: (line.suite, line.name))
        ]
        columns = min(_COLUMNS, len(drawn))
        rows = -(-len(drawn) // columns)
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False
        )
        for axes in grid.flat[len(drawn) :]:
            axes.set_axis_off()
        for axes, (suite, name, lines) in zip(grid.flat, drawn, strict=False):
            along(
                axes,
                [visible(line.label) for line in lines],
                [line.row.value for line in lines],
                [line.row.interval for line in lines],
            )
            axes.set_title(visible(f"{suite}: {name}, {lines[0].row.measure}").replace("$", r"\$"), fontsize=9)
        save_figure(figure, output, dpi=110)

    def write(self, folder: Path) -> list[Path]:
        """Write ``report.md``, ``report.html`` and ``report.png``; raises where something else lies in their place."""
        paths = places(folder)
        markdown, page, picture = paths
        self.plot(picture)
        save_page(page, self.show, title="evaluation", width=_PAGE_WIDTH, picture=picture)
        write_atomically(markdown, self.markdown().encode())
        return paths


def _group(name: str, lines: Sequence[Line]) -> Group:
    measure = lines[0].row.measure
    rows = [((f"  {line.cells[2]}", *line.cells[3:]), _told(line)) for line in lines]
    return Group(name if name.endswith(f".{measure}") else f"{name}, {measure}", rows)


def places(folder: Path) -> list[Path]:
    """Where an overview is written.

    Raises:
        NotOursError: something else lies there.
    """
    paths = [folder / name for name in _NAMES]
    for path in paths:
        check_replaceable(path)
    return paths


def read_reports(paths: Sequence[Path]) -> list[Finished]:
    """Reports in the order of the paths; of a folder, those below it by name, numbers by size.

    Raises:
        DataError: there is none, or one is damaged.
    """
    found = [one for one in in_order(paths) if one in paths or read_json(one).get("kind") == KIND]
    if not found:
        named = ", ".join(map(str, paths))
        raise DataError("no report of a suite", source=named, remedy="write one: vpmoe eval --help lists the suites")
    return [Finished.read(path) for path in found]


def in_order(paths: Sequence[Path]) -> list[Path]:
    """The JSON files that paths name, each once: of a folder those below it, by name and numbers by size."""
    inner = (sorted(path.rglob("*.json"), key=_natural) if path.is_dir() else [path] for path in paths)
    return [*dict.fromkeys(one for some in inner for one in some)]


def missed(reports: Sequence[Finished], floors: dict[str, float]) -> list[str]:
    """A line for each number that is below its floor.

    Raises:
        DataError: no report has the task, or less of it is better.
    """
    lines = []
    for task, floor in floors.items():
        holding = [one for one in reports if task in one.rows]
        if not holding:
            known = ", ".join(dict.fromkeys(name for one in reports for name in one.rows))
            raise DataError(f"there is no task {task!r}", source="--fail-below", remedy=f"choose among {known}")
        for one in holding:
            row = one.rows[task]
            if row.better < 0:
                fault = f"of {task} less is better: it has no floor"
                raise DataError(fault, source="--fail-below", remedy="name a task that is measured by a share")
            if row.value < floor:
                bounds = _bounds(row.interval)
                lines.append(f"{task} of {visible(one.label)} is {row.value:.4f} {bounds}, below {floor:g}")
    return lines


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def _labels(reports: Sequence[Finished]) -> list[str]:
    """The checkpoints' names; the files' where two are the same."""
    labels = [one.label for one in reports]
    return [str(one.path) if labels.count(one.label) > 1 else one.label for one in reports]


def _bounds(interval: Bounds | None, sign: str = "") -> str:
    return "" if interval is None else f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def _told(line: Line) -> bool:
    return line.difference is not None and line.difference.exceeds_noise
