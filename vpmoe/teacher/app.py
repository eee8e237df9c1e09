"""``vpmoe data annotate``: the verbs of ``vpmoe data`` that need a model, beside those that need none."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from vpmoe.data_curation.app import app


@app.command()
def annotate(
    dataset: Annotated[Path, typer.Argument(help="of token files, such as preference pairs")],
    reference: Annotated[
        Path, typer.Option(help="a run, a checkpoint, an object of a ladder, or an HF directory, of its vocabulary")
    ],
    output_dir: Annotated[Path, typer.Option(help="folder of the annotated dataset")],
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", help="precision (default: as the reference was trained, else fp32)"),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="rows of the dataset's seq_length scored together")] = 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace what was made of other input or options")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Have a frozen model score every label ahead of time: a dataset that dpo trains on without a second model.

    The dataset stays as it is; the annotated one shares its token files. A killed command goes on where it was.
    """
    from vpmoe.teacher.reference import annotate_with_reference

    say = partial(print, file=sys.stderr, flush=True)
    made = annotate_with_reference(
        dataset, reference, output_dir, bf16=bf16, rows=rows, overwrite=overwrite, quiet=quiet, say=say
    )
    names = ", ".join(one.name for one in made.annotations)
    typer.echo(f"{output_dir}: {sum(entry.rows for entry in made.splits.values()):,} documents with {names}")
