"""``vpmoe data ...``: look at datasets, check them, and make the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vpmoe.data_curation import synth_mini as mini
from vpmoe.data_curation.inspect import inspect as show
from vpmoe.data_curation.verify import DEFAULT_PARSED_PER_SHARD, manifest_summary
from vpmoe.data_curation.verify import verify as find_faults
from vpmoe.errors import DataError

app = typer.Typer(no_args_is_help=True, help="Datasets: verify, inspect, and the generated one.")

_Folder = Annotated[Path, typer.Argument(help="folder with a manifest.json")]


@app.command()
def verify(
    dataset_dir: _Folder,
    input_dir: Annotated[
        Path | None, typer.Option(help="the conversations it was built from: are they unchanged?")
    ] = None,
    parsed_per_shard: Annotated[
        int, typer.Option(help="conversations of each shard to parse")
    ] = DEFAULT_PARSED_PER_SHARD,
) -> None:
    """Re-hash and re-check a dataset (token files or conversations); lists every fault, exit code 2 if there is one."""
    faults = find_faults(dataset_dir, input_dir=input_dir, parsed_per_shard=parsed_per_shard)
    if faults:
        raise DataError(f"{len(faults)} faults\n" + "\n".join(faults), source=str(dataset_dir))
    typer.echo(f"{dataset_dir}: sound; {manifest_summary(dataset_dir)}")


@app.command()
def inspect(
    dataset_dir: _Folder,
    split: Annotated[str, typer.Option(help="train or valid")] = "train",
    count: Annotated[int, typer.Option(help="conversations to show; 0 for the figures alone")] = 3,
    start: Annotated[int, typer.Option(help="number of the first conversation shown")] = 0,
) -> None:
    """Print a dataset's figures and decoded conversations, each span in its colour."""
    show(dataset_dir, Console(), split=split, count=count, start=start)


@app.command("synth-mini")
def synth_mini(
    output_dir: Annotated[Path, typer.Option(help="folder to write")],
    rows: Annotated[int, typer.Option(help="rows of the pool (train and valid)")] = 20_000,
    seed: Annotated[int, typer.Option(help="another seed draws other rows; the test questions stay")] = 1,
    families: Annotated[str, typer.Option(help="name=weight,name=weight")] = mini.DEFAULT_MIX,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace rows of another seed or size")] = False,
) -> None:
    """Generate rows of SYNTH's schema: small tasks with a written derivation and an answer that can be checked."""
    mix = mini.parse_mix(families)
    made = mini.generate(output_dir, rows=rows, seed=seed, families=mix, overwrite=overwrite)
    typer.echo(mini.report(output_dir, rows, made))
