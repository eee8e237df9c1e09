"""``vpmoe upcycle ...``: list the objects of a ladder, make them, check them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpmoe import steps
from vpmoe.errors import UpcycleError, VpmoeError
from vpmoe.upcycle import runner
from vpmoe.upcycle.ladder_file import LADDER, read_ladder

app = typer.Typer(no_args_is_help=True, help="The ladder from Qwen3-0.6B to vpMoE.")

ObjectArgument = Annotated[str, typer.Argument(metavar="OBJECT", help="an id of the ladder's file")]
LadderOption = Annotated[Path, typer.Option("--ladder", metavar="FILE", help="the ladder's file")]


@app.command("list")
def list_(ladder: LadderOption = LADDER) -> None:
    """List every object: rung, id, where it lies, whether it is there."""
    for spec in read_ladder(ladder).objects.values():
        missing = f"missing: {spec.origin or ''}" if spec.is_source else "not made yet"
        made = "there" if Path(spec.path).is_dir() else missing
        typer.echo(f"rung {spec.rung}  {spec.id:<24}{spec.path:<36}{made}")


@app.command()
def run(
    identifier: ObjectArgument,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the object if it is out of date or damaged")
    ] = False,
    chain: Annotated[bool, typer.Option("--chain", help="make what it is made from first, where that is due")] = False,
    ladder: LadderOption = LADDER,
) -> None:
    """Make an object; interrupted, the same command goes on; done and up to date, it does nothing."""
    found = read_ladder(ladder)
    for spec in found.chain(identifier) if chain else [found.get(identifier)]:
        planned = runner.plan(found, spec.id)
        made = runner.run(planned, overwrite=overwrite, say=lambda line: typer.echo(line, err=True))
        typer.echo(json.dumps(made["report"]["verification"], indent=2))


@app.command()
def check(
    identifier: Annotated[str | None, typer.Argument(metavar="[OBJECT]", help="default: all that are made")] = None,
    ladder: LadderOption = LADDER,
) -> None:
    """Hash every file of made objects again and hold it to the receipt; exit code 2 if there is a fault."""
    found = read_ladder(ladder)
    made = [spec for spec in found.objects.values() if not spec.is_source and Path(spec.path).is_dir()]
    faults = []
    for spec in [found.get(identifier)] if identifier else made:
        try:
            fault = runner.plan(found, spec.id).step.state(check_hashes=True).due
        except VpmoeError as error:
            fault = error.what
        typer.echo(f"{spec.id}: {fault or 'sound and up to date'}")
        faults += [spec.id] if fault else []
    if faults:
        raise UpcycleError(
            f"{len(faults)} objects are not as they should be: {', '.join(faults)}",
            remedy="vpmoe upcycle run OBJECT --overwrite makes one again",
        )


@app.command()
def receipt(identifier: ObjectArgument, ladder: LadderOption = LADDER) -> None:
    """Print the receipt of an object, without its lists of files."""
    found = steps.read_receipt(Path(read_ladder(ladder).get(identifier).path))
    for item in [found, *found["report"]["inputs"].values()]:
        name = "files" if item is found else "content"
        item[name] = f"{len(item[name])} files"
    typer.echo(json.dumps(found, indent=2))
