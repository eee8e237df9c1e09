"""``vpmoe make-plots``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpmoe.errors import DataError
from vpmoe.runs.app import RunsArgument, StoreOption, found_runs

app = typer.Typer(add_completion=False)


@app.command("make-plots")
def make_plots(
    runs: RunsArgument,
    prompts: Annotated[
        Path, typer.Option(help='what the models are asked: a text a line, or a .jsonl of {"prompt": text}')
    ],
    output_dir: Annotated[Path, typer.Option(help="gets the figures, and figures.json")] = Path("reports/figs"),
    max_new_tokens: Annotated[int, typer.Option(min=2, help="written after each prompt at most")] = 64,
    plain: Annotated[
        bool, typer.Option("--plain", help="give the prompts as they are, not as questions in a conversation")
    ] = False,
    passage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="one of them that was only pretrained: goes on with the prompts; may be given several times",
        ),
    ] = None,
    smoothing: Annotated[
        float, typer.Option(min=0.0, max=0.9999, help="of the curves: weight of what came before")
    ] = 0.0,
    store: StoreOption = None,
) -> None:
    """All figures of runs: of each training, and of their models beside each other over many prompts.

    RUN is an id, the beginning of one, a name or a directory; its model is the newest checkpoint. Pictures of ours are
    replaced, others never. figures.json holds the numbers: over the prompts the mean and the standard deviation.
    """
    from vpmoe.runs.figures import NAME, make

    found = found_runs(runs, store)
    only_pretrained = {run.id: run for run in found_runs(passage or [], store)}  # by id: one at work changes in between
    if strange := only_pretrained.keys() - {run.id for run in found}:
        name = next(run.name for run in only_pretrained.values() if run.id in strange)
        raise DataError("the run is none of those drawn", source=f"--passage {name}", remedy="name it as RUN too")
    report = make(
        found,
        prompts,
        output_dir,
        new_tokens=max_new_tokens,
        plain=plain,
        passages=[run for run in found if run.id in only_pretrained],
        smoothing=smoothing,
        say=lambda line: typer.echo(line, err=True),
    )
    names = [name for files in report["figures"].values() for name in files]
    typer.echo(f"{output_dir}: {', '.join(names)} and {NAME}")
