"""``vpmoe eval report`` and ``compare``: what the suites have found, over checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from megatron_vpmoe.errors import ConfigError

_REPORTS = Path("reports") / "eval"


def report(
    reports: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[REPORT]...",
            help="reports of suites in the order of the checkpoints, or folders of them (default: reports/eval)",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="folder for report.md, report.html and report.png as well")
    ] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=VALUE", help="exit 1 where a report's number is lower; may be given several times"),
    ] = None,
) -> None:
    """All numbers of all checkpoints: 95 % intervals, and what changed from one checkpoint to the next.

    A change has the 95 % interval of a paired bootstrap, and is noise unless that leaves out 0.
    """
    from rich.console import Console

    from vpmoe.eval.suites.overview import Overview, missed, places, read_reports

    floors: dict[str, float] = {}
    for task, floor in map(_floor, fail_below or ()):
        if task in floors:
            raise ConfigError(f"{task} has two floors", source="--fail-below", remedy="give it one")
        floors[task] = floor
    found = read_reports(reports or [_REPORTS])
    below = missed(found, floors)
    if output_dir is not None:
        places(output_dir)
    overview = Overview.of(found)
    console = Console()
    overview.show(console)
    if output_dir is not None:
        typer.echo(f"{', '.join(map(str, overview.write(output_dir)))} written", err=True)
    for line in below:
        typer.echo(line, err=True)
    if below:
        raise typer.Exit(1)


def _floor(text: str) -> tuple[str, float]:
    task, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not task or not math.isfinite(value):
        raise ConfigError(f"{text!r} is no floor", source="--fail-below", remedy="TASK=VALUE, such as arc_easy=0.4")
    return task, value


def compare(
    former: Annotated[Path, typer.Argument(metavar="A", help="a report of a suite")],
    later: Annotated[Path, typer.Argument(metavar="B", help="another of the same suite, items and settings")],
    resamples: Annotated[int, typer.Option(min=1000, help="of the bootstrap")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="of the bootstrap")] = 1337,
) -> None:
    """Which differences of two models exceed noise: B minus A, by a paired bootstrap on the items.

    Each model keeps what it made of an item; the items are drawn anew with replacement. Of canaries also: where B's
    answers to the pinned prompts part from A's.
    """
    from rich.console import Console

    from vpmoe.eval.suites.compare import differences, show
    from vpmoe.eval.suites.finished import Finished
    from vpmoe.eval.suites.pinned import Outputs, difference, lines_of

    pair = Finished.read(former), Finished.read(later)
    show(*pair, differences(*pair, resamples=resamples, seed=seed), Console())
    if pair[1].report.suite == "canaries":
        typer.echo("\n".join(lines_of(difference(Outputs.read(later), Outputs.read(former)))))
