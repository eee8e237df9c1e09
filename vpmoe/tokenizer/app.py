"""``vpmoe tokenizer ...``: the rank file behind every vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpmoe.tokenizer import rank_file

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The o200k rank file behind every vocabulary.")


@app.callback()
def verbs() -> None:
    """The o200k rank file behind every vocabulary."""


@app.command()
def install(
    output_dir: Annotated[Path, typer.Option(help="where every command looks for it")] = rank_file.DEFAULT_DIRECTORY,
    tokenizer_model: Annotated[
        Path | None, typer.Option(help="take this file instead of the package bpe-openai's")
    ] = None,
) -> None:
    """Put the o200k rank file in place: offline, out of the package bpe-openai, its hash checked."""
    path = rank_file.install(output_dir, configured=tokenizer_model)
    typer.echo(f"{path}: sha256 {rank_file.SHA256} checked")
