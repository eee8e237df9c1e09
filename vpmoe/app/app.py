"""``vpmoe app``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command("app")
def serve_app(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="runs, checkpoints, objects of a ladder or HF directories to offer beside the runs of the store",
        ),
    ] = None,
    dataset: Annotated[
        list[Path] | None,
        typer.Option(help="a built dataset, or a folder of some; may be given several times (default: data/megatron)"),
    ] = None,
    reports: Annotated[
        list[Path] | None,
        typer.Option(help="a report, or a folder of some; may be given several times (default: reports)"),
    ] = None,
    runs_store: Annotated[
        Path | None, typer.Option(help="the run store (default: where vpmoe runs looks, and vpmoe train writes)")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8501,
    address: Annotated[str, typer.Option(help="to listen on; another than loopback lets others in")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option("--browser", help="open a browser, too")] = False,
) -> None:
    """Look at runs, routing, models, data and reports in a browser; Ctrl-C ends it.

    Nothing that you have is changed, and nothing is sent anywhere.
    """
    from vpmoe.app.places import Places
    from vpmoe.app.serve import serve

    places = Places(
        runs_store=runs_store,
        models=tuple(models or ()),
        datasets=tuple(dataset or (Path("data") / "megatron",)),
        reports=tuple(reports or (Path("reports"),)),
    )
    serve(places, port=port, address=address, browser=browser, say=lambda line: typer.echo(line, err=True))
