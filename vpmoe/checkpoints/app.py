"""``vpmoe checkpoint ...``: inspect, verify, diff, export-step."""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_vpmoe.errors import CheckpointError, NotOursError
from vpmoe.checkpoints import contents, difference, soundness, tables
from vpmoe.checkpoints.places import find
from vpmoe.progress import hashing
from vpmoe.steps import check_replaceable
from vpmoe.weights.progress import TensorProgress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Checkpoints: what is in one, is it sound, how do two differ; one step of it as a program.",
)

_WHERE = "a run, a checkpoint (iter_NNNNNNN), an object of a ladder, or an HF directory"
PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help=_WHERE)]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead")]
_QUIET_BYTES = 1 << 30


@app.command()
def inspect(
    path: PathArgument,
    tensors: Annotated[
        str | None, typer.Option(metavar="GLOB", help="list the tensors of such names instead, as '*router*'")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what it is, what it was trained on, the layout it was saved under, its tensors by part, where it comes from.

    No tensor is read. Names and sizes of files are checked; vpmoe checkpoint verify reads them.
    """
    if tensors is not None:
        rows = _matching(path, tensors)
        typer.echo(json.dumps(rows, indent=1) if as_json else tables.tensor_table(rows))
        return
    found = contents.inspected(path)
    typer.echo(json.dumps(found, indent=1) if as_json else tables.contents_text(found))


def _matching(path: Path, pattern: str) -> list[dict[str, Any]]:
    found = {name: tensor for name, tensor in find(path).tensors().items() if fnmatch.fnmatchcase(name, pattern)}
    if not found:
        raise CheckpointError("no tensor has such a name", source=f"--tensors {pattern}", remedy=difference.PATTERNS)
    return [
        {
            "name": name,
            "group": contents.group_of(name),
            "shape": list(tensor.shape),
            "dtype": contents.dtype_name(tensor),
            "bytes": tensor.nbytes,
        }
        for name, tensor in found.items()
    ]


@app.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help=f"{_WHERE}; of a run all its checkpoints")],
    as_json: JsonOption = False,
) -> None:
    """Hold every file against its size and hash, and name each damage; exit code 1 where there is one. Reads only."""
    of_each = {path: soundness.listed(path) for path in dict.fromkeys(paths)}
    lists = [each for found in of_each.values() for each in found]
    with hashing("verify", sum(each.bytes for each in lists)) as tell:
        found = [(each, soundness.damages(each, tell)) for each in lists]
    # A run at work prunes: what has gone as a whole meanwhile is no damage.
    found = [(each, damages) for each, damages in found if os.path.lexists(each.folder)]
    if as_json:
        entries = [
            {"path": str(each.folder), "files": len(each.files), "bytes": each.bytes, "damages": damages}
            for each, damages in found
        ]
        typer.echo(json.dumps(entries, indent=1))
    else:
        typer.echo("\n".join(line for each, damages in found for line in tables.verified_lines(each, damages)))
    if any(damages for _, damages in found):
        raise typer.Exit(1)


@app.command()
def diff(
    first: PathArgument,
    second: PathArgument,
    weights: Annotated[bool, typer.Option("--weights", help="leave out the optimizer's state")] = False,
    tensors: Annotated[str, typer.Option(metavar="GLOB", help="compare those of such names, as '*router*'")] = "*",
    show_all: Annotated[
        bool, typer.Option("--all", help="list every tensor that differs, not the largest few")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare configuration, provenance and every tensor, bit for bit and by the largest difference; exit code 1 where
    tensors differ. What another layout wrote compares equal; two tensors at a time are in memory."""
    pair = difference.opened(first, second, pattern=tensors, weights_only=weights)
    with TensorProgress("diff", pair.bytes, quiet=pair.bytes < _QUIET_BYTES) as progress:
        found = list(pair.tensors(progress))
    counts = Counter("equal" if each.equal else each.only or "differ" for each in found)
    if as_json:
        told = {"configuration": pair.configuration, "provenance": pair.provenance, "counts": dict(counts)}
        told |= {"tensors": [asdict(each) for each in found if not each.equal]}
        typer.echo(json.dumps(told, indent=1))
    else:
        typer.echo(tables.difference_text(pair, found, show_all=show_all))
    if counts["equal"] < len(found):
        raise typer.Exit(1)


@app.command(name="export-step")
def export_step(
    path: PathArgument,
    output: Annotated[Path, typer.Option(dir_okay=False, help="the file, such as step.pt2")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that is there")] = False,
) -> None:
    """Write one decoding step of a mixture or a state space model as a program of torch.export, in fp32 for a CPU.

    It takes token ids, positions and a state, gives logits and the next state, and needs nothing but torch to run.
    """
    from megatron_vpmoe.generation import exported_step
    from vpmoe.eval.open_model import open_model

    if output.exists() and not overwrite:
        raise NotOursError("there is a file", source=str(output), remedy="name another one, or give --overwrite")
    check_replaceable(output, exported_step.MARK)
    with open_model(path, bf16=False) as opened:
        entries = exported_step.export_step(opened.model, output, opened.entry).values()
        row = sum(math.prod(one.shape) * one.dtype.itemsize for one in entries if not one.grows)
        token = sum(math.prod(one.shape) * one.dtype.itemsize for one in entries if one.grows)
        typer.echo(f"{output}: one step of {opened.described}; a state of {row:,} bytes a row and {token:,} a token")
