"""``vpmoe model ...``: look at the architecture that a configuration describes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_vpmoe.config import load_config, parameter_count
from megatron_vpmoe.config.rules import ARCHITECTURE, IDLE, RUN
from vpmoe.describe.picture import write_picture
from vpmoe.describe.table import description, print_description

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Architectures: layer table, sizes, picture, what goes together."
)

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of a command that takes ``--field-name value`` after its own options."""
ConfigArgument = Annotated[Path, typer.Argument(help="a run's YAML; --field-name value after it overrides a field")]


@app.command(context_settings=OVERRIDES)
def describe(
    context: typer.Context,
    config: ConfigArgument,
    every_layer: Annotated[bool, typer.Option("--all", help="one row a layer, not one a kind")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, one entry a layer, instead")] = False,
    picture: Annotated[
        Path | None, typer.Option(dir_okay=False, help="also draw the stack to this file, .svg or .png")
    ] = None,
) -> None:
    """Print the layer table with parameters, KV bytes and FLOPs per token; nothing is allocated."""
    cfg = load_config(config, context.args)
    if picture is not None:
        write_picture(cfg, picture)
    if as_json:
        typer.echo(json.dumps({"config": str(config), **description(cfg)}, indent=1))
        return
    # A pipe has no width of its own: the table is not to be cut there.
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    print_description(cfg, str(config), console, every_layer=every_layer)
    if picture is not None:
        typer.echo(f"{picture} written")


@app.command(name="param-count", context_settings=OVERRIDES)
def param_count(context: typer.Context, config: ConfigArgument) -> None:
    """Count the parameters of a configuration, part by part; nothing is allocated."""
    count = parameter_count(load_config(config, context.args))
    typer.echo(f"parameters of {config}")
    for part, value in count.parts.items():
        typer.echo(f"  {part:<28}{value:>16,}{100 * value / count.total:>8.2f} %")
    typer.echo(f"  {'total':<28}{count.total:>16,}")
    typer.echo(f"  {'active':<28}{count.active:>16,}   one token's, of the routed experts the top-k")
    typer.echo(f"  {'active without embeddings':<28}{count.active_without_embeddings:>16,}")


@app.command()
def combinations() -> None:
    """Print which choices are refused and why, and which fields of an architecture are idle where."""
    for title, head, rules in (
        ("Architectures that are refused", "refused because", ARCHITECTURE),
        ("Runs that are refused", "refused because", RUN),
        ("Idle", "where", IDLE),
    ):
        shown = Table("fields", head, title=title, title_justify="left")
        for rule in rules:
            shown.add_row("\n".join(rule.names), re.sub("[`*]", "", rule.general_text()))
            shown.add_section()
        Console().print(shown)
