"""``vpmoe runs``: every training that ran, asked, compared, drawn, exported."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_vpmoe.errors import visible
from vpmoe.errors import DataError
from vpmoe.runs.panels import FIGURES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Look at the runs that have registered themselves, at work or not. RUN is an id, the beginning of one, a name "
    "(the newest of that name) or a directory.",
)

By = StrEnum("By", ["step", "tokens", "time"])
Status = StrEnum("Status", ["running", "finished", "stopped", "failed", "killed", "unknown"])
Figure = StrEnum("Figure", list(FIGURES))

StoreOption = Annotated[
    Path | None, typer.Option(help="the registry (default: $VPMOE_RUN_STORE, else runs/registry.sqlite)")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN")]
RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN...")]
TagsOption = Annotated[list[str] | None, typer.Option(help="metrics, by glob; may be given several times")]
ByOption = Annotated[By, typer.Option(help="what the curves are laid over; time is seconds of training")]
JsonOption = Annotated[bool, typer.Option("--json", help="as JSON")]
_USUAL = ("loss/total", "valid*/loss/total", "valid/reward*", "rollout/reward_mean")


def found_runs(texts: list[str], store: Path | None) -> list[Any]:
    """The runs that are named, each once; raises as :func:`vpmoe.runs.registry.choose`."""
    from vpmoe.runs.registry import choose, list_runs, store_path

    runs = list_runs(store)
    found = [choose(text, runs, store_path(store)) for text in texts]
    return list({run.id: run for run in found}.values())


def _tags(runs: list[Any], globs: list[str] | None) -> list[str]:
    import fnmatch

    from vpmoe.runs.queries import matching, tags_of

    there = tags_of(runs)
    if globs:
        return matching(globs, there)
    usual = [tag for glob in _USUAL for tag in there if fnmatch.fnmatchcase(tag, glob)]
    return list(dict.fromkeys(usual)) or matching(["*loss*"], there)


def _print_json(value: Any) -> None:
    def plain(item: Any) -> Any:
        if isinstance(item, float) and item - item != 0:
            return str(item)
        if isinstance(item, dict):
            return {key: plain(each) for key, each in item.items()}
        return [plain(each) for each in item] if isinstance(item, list | tuple) else item

    typer.echo(json.dumps(plain(value), indent=2, default=str, allow_nan=False))


@app.command("list")
def list_(
    experiment: Annotated[str | None, typer.Option(help="of this experiment alone")] = None,
    status: Annotated[Status | None, typer.Option(help="of this status alone")] = None,
    tag: Annotated[str | None, typer.Option(help="with this tag alone")] = None,
    sort: Annotated[str, typer.Option(help="started, name, experiment, status, step, or a metric's tag")] = "started",
    limit: Annotated[int | None, typer.Option(min=1, help="so many (default: all)")] = None,
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """The runs, the newest first; by a metric, the lowest first."""
    from vpmoe.runs.registry import list_runs, store_path
    from vpmoe.runs.tables import console, show_list

    runs = [
        run
        for run in list_runs(store)
        if experiment in (None, run.experiment) and status in (None, run.status) and (tag is None or tag in run.tags)
    ]
    if sort in ("name", "experiment", "status"):
        runs.sort(key=lambda run: getattr(run, sort))
    elif sort == "step":
        runs.sort(key=lambda run: -run.step)
    elif sort != "started":
        if runs and not any(sort in run.results for run in runs):
            there = sorted({tag for run in runs for tag in run.results})
            raise DataError(f"no run has the result {sort!r}", source="--sort", remedy=f"one of {', '.join(there)}")
        runs.sort(key=lambda run: (sort not in run.results, run.results.get(sort, 0.0)))
    if as_json:
        _print_json([_plain(run) for run in runs[:limit]])
    elif runs:
        show_list(runs[:limit], console())
    else:
        typer.echo(f"no such run in {store_path(store)}; every vpmoe train registers itself there", err=True)


def _plain(run: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(run), "directory": str(run.directory)}


@app.command()
def show(
    run: RunArgument,
    config: Annotated[bool, typer.Option("--config", help="with the whole resolved configuration")] = False,
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """One run: origin, results, its metrics as small curves, checkpoints, samples."""
    from vpmoe.runs.queries import last_values
    from vpmoe.runs.tables import console, show_run

    (found,) = found_runs([run], store)
    if as_json:
        _print_json({**_plain(found), "metrics": last_values(found)})
    else:
        show_run(found, console(), config=config)


@app.command()
def compare(
    runs: RunsArgument,
    by: ByOption = By.step,
    tags: TagsOption = None,
    points: Annotated[int, typer.Option(min=1, help="rows of a table")] = 10,
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Runs beside each other: curves at points that all have reached, last values, what differs in configuration."""
    from vpmoe.runs.comparison import config_differences, origin_differences, overlay
    from vpmoe.runs.tables import console, show_comparison

    found = found_runs(runs, store)
    if len(found) < 2:
        raise DataError("one run alone cannot be compared", source=" ".join(runs), remedy="name two runs or more")
    chosen = _tags(found, tags)
    if not as_json:
        show_comparison(found, chosen, console(), by=by, points=points)
        return
    _print_json(
        {
            "runs": [_plain(run) for run in found],
            "config": dict(config_differences(found)),
            "origin": dict(origin_differences(found)),
            "curves": overlay(found, chosen, by=by, points=points).to_dict("records"),
        }
    )


@app.command()
def plot(
    runs: RunsArgument,
    output: Annotated[Path, typer.Option(help="PNG, SVG or PDF; replaced only if it is such a picture of ours")],
    tags: TagsOption = None,
    figure: Annotated[
        list[Figure] | None, typer.Option(help="a figure of a training by name; may be given several times")
    ] = None,
    by: ByOption = By.step,
    smoothing: Annotated[float, typer.Option(min=0.0, max=0.9999, help="weight of what came before")] = 0.0,
    log_x: Annotated[bool, typer.Option("--log-x", help="logarithmic axis")] = False,
    log_y: Annotated[bool, typer.Option("--log-y", help="logarithmic axis")] = False,
    store: StoreOption = None,
) -> None:
    """Curves of runs as a picture: fields of the figures that are named, and each metric in one of its own."""
    from vpmoe.runs import panels, plots
    from vpmoe.runs.queries import tags_of

    found = found_runs(runs, store)
    chosen = panels.of_figures(figure or (), tags_of(found))
    chosen += panels.of_tags(_tags(found, tags)) if tags or not figure else []
    plots.plot(found, chosen, output, by=by, smoothing=smoothing, log_x=log_x, log_y=log_y)
    typer.echo(f"{output}: {len(chosen)} fields of {len(found)} runs")


@app.command()
def export(
    runs: RunsArgument,
    output: Annotated[Path, typer.Option(help="a new file: .csv, .parquet or .jsonl")],
    tags: TagsOption = None,
    store: StoreOption = None,
) -> None:
    """Records of runs into one file: run, name, step, tag, value, tokens, seconds."""
    from vpmoe.runs import export as exporting
    from vpmoe.runs.queries import matching, tags_of

    found = found_runs(runs, store)
    chosen = matching(tags, tags_of(found)) if tags else None
    typer.echo(f"{output}: {exporting.export(found, output, chosen):,} records")


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="one SELECT over the tables runs and metrics")],
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Ask in SQL (DuckDB's): runs(run, name, ...), metrics(run, step, tag, value, tokens, seconds). It only reads."""
    from vpmoe.runs.database import ask
    from vpmoe.runs.tables import console, show_rows

    columns, rows = ask(query, store)
    if as_json:
        _print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        show_rows(columns, rows, console())


@app.command()
def tag(
    run: RunArgument,
    tags: Annotated[list[str], typer.Argument(metavar="TAG...")],
    store: StoreOption = None,
) -> None:
    """Put tags on a run."""
    from vpmoe.runs import editing

    (found,) = found_runs([run], store)
    editing.tag(found, tags, store)


@app.command()
def untag(
    run: RunArgument,
    tags: Annotated[list[str], typer.Argument(metavar="TAG...")],
    store: StoreOption = None,
) -> None:
    """Take tags off a run."""
    from vpmoe.runs import editing

    (found,) = found_runs([run], store)
    editing.untag(found, tags, store)


@app.command()
def note(
    run: RunArgument,
    text: Annotated[str, typer.Argument(help="in place of the former note; empty: none")],
    store: StoreOption = None,
) -> None:
    """Give a run a note."""
    from vpmoe.runs import editing

    (found,) = found_runs([run], store)
    editing.note(found, text, store)


@app.command()
def add(
    directory: Annotated[Path, typer.Argument(help="of a run that the registry does not know")],
    store: StoreOption = None,
) -> None:
    """Register a run that came from another machine, or is older than the registry."""
    from vpmoe.runs import editing

    run = editing.add(directory, store)
    typer.echo(visible(f"{run.id} {run.name}: {run.status}, step {run.step}"))


@app.command()
def rm(
    runs: RunsArgument,
    files: Annotated[
        bool, typer.Option("--files", help="the directories too, if runs alone have written there")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    store: StoreOption = None,
) -> None:
    """Remove runs from the registry; their directories stay, but with --files. Not while they run."""
    from vpmoe.runs import editing, removal

    found = found_runs(runs, store)
    for run in found:
        if run.status == "running":
            raise DataError(f"{run.name} is running", source=str(run.directory), remedy=f"end it first: kill {run.pid}")
        gone = f" and {run.directory} ({removal.check_removable(run) / 2**20:,.1f} MiB)" if files else ""
        typer.echo(visible(f"the entry of {run.name} ({run.id}){gone}"))
    if not yes:
        typer.confirm("remove this?", abort=True)
    for run in found:
        if files:
            removal.remove_files(run)
        editing.forget(run, store)
