"""``vpmoe upcycle ...``: list the objects of the ladder, make them, check them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpmoe.errors import UpcycleError, VpmoeError
from vpmoe.upcycle import receipt as receipts
from vpmoe.upcycle import runner
from vpmoe.upcycle.registry import OBJECTS, Registry, load_registry

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The ladder from Qwen3-0.6B to vpMoE.")

ObjectArgument = Annotated[str, typer.Argument(metavar="OBJECT", help="an id of objects.toml")]
ObjectsOption = Annotated[Path, typer.Option(help="the registry")]


@app.command("list")
def list_(objects: ObjectsOption = OBJECTS) -> None:
    """List every object: rung, id, where it lies, whether it is there."""
    for spec in load_registry(objects).objects.values():
        there = Path(spec.path).is_dir()
        made = "there" if there else ("missing: " + (spec.origin or "") if spec.kind == "source" else "not made yet")
        typer.echo(f"rung {spec.rung}  {spec.id:<24}{spec.path:<36}{made}")


@app.command()
def run(
    identifier: ObjectArgument,
    force: Annotated[bool, typer.Option("--force", help="replace the object if it is out of date or damaged")] = False,
    chain: Annotated[bool, typer.Option("--chain", help="make what it is made from first, where that is due")] = False,
    objects: ObjectsOption = OBJECTS,
) -> None:
    """Make an object; interrupted, the same command goes on; done and up to date, it does nothing."""
    registry = load_registry(objects)
    for spec in registry.chain(identifier) if chain else [registry.get(identifier)]:
        planned = runner.plan(registry, spec.id)
        made = runner.run(planned, force=force, say=lambda line: typer.echo(line, err=True))
        typer.echo(json.dumps(made["verification"], indent=2))


@app.command()
def check(
    identifier: Annotated[str | None, typer.Argument(metavar="[OBJECT]", help="default: all that are made")] = None,
    objects: ObjectsOption = OBJECTS,
) -> None:
    """Hash every file of made objects again and hold it to the receipt; exit code 2 if there is a fault."""
    registry = load_registry(objects)
    chosen = [registry.get(identifier)] if identifier else _made(registry)
    faults = []
    for spec in chosen:
        try:
            planned = runner.plan(registry, spec.id)
            fault = runner.up_to_date(planned, check_hashes=True)
        except VpmoeError as error:
            fault = error.what
        typer.echo(f"{spec.id}: {fault or 'sound and up to date'}")
        faults += [spec.id] if fault else []
    if faults:
        raise UpcycleError(
            f"{len(faults)} objects are not as they should be: {', '.join(faults)}",
            remedy="vpmoe upcycle run OBJECT --force makes one again",
        )


def _made(registry: Registry) -> list:
    return [spec for spec in registry.objects.values() if spec.kind == "derived" and Path(spec.path).is_dir()]


@app.command()
def receipt(identifier: ObjectArgument, objects: ObjectsOption = OBJECTS) -> None:
    """Print the receipt of an object, without its lists of files."""
    found = receipts.read_receipt(Path(load_registry(objects).get(identifier).path))
    found["outputs"] = {**found["outputs"], "files": f"{len(found['outputs']['files'])} files"}
    found["inputs"] = {role: {**item, "files": f"{len(item['files'])} files"} for role, item in found["inputs"].items()}
    typer.echo(json.dumps(found, indent=2))
