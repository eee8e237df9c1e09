"""``vpmoe ladder``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpmoe.ladder.climb import Request, climb, listing
from vpmoe.upcycle.ladder_file import LADDER, read_ladder

app = typer.Typer(add_completion=False)


@app.command()
def ladder(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="the ladder: objects, jobs, evaluation")] = LADDER,
    out: Annotated[Path | None, typer.Option(help="folder of the report (default: the ladder's)")] = None,
    first: Annotated[int, typer.Option("--from", min=0, help="rung to begin with; those below have to be there")] = 0,
    last: Annotated[int | None, typer.Option("--to", min=0, help="rung to end with (default: the last)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is out of date or damaged")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what is done and what is due; make nothing")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
) -> None:
    """Climb the whole ladder: make every object, evaluate every rung, write one report (JSON, table, plot).

    Rungs 1 to 6 lead from Qwen3 to vpMoE, 7 to 9 are the stages of distillation.

    What it names and cannot make (datasets, records, prompts, weights) has to be there first; --to 6 needs less of it.

    What is done and still valid is skipped; after an interruption the same command goes on where it stopped.
    """
    request = Request(file, reports=out, first=first, last=last, overwrite=overwrite, quiet=quiet)
    if dry_run:
        typer.echo("\n".join(listing(request)))
        return
    climb(request, lambda line: typer.echo(line, err=True))
    folder = out or read_ladder(file).reports
    typer.echo((folder / "ladder.md").read_text())
    typer.echo(f"{folder / 'ladder.json'}, ladder.md and ladder.png written")
