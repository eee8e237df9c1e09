"""``vpmoe data ...``: build datasets, look at them, check and compare them, and make the embedded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vpmoe.data_curation.checks import stats as comparison
from vpmoe.data_curation.checks.sample import DEFAULT_DOCUMENTS
from vpmoe.data_curation.checks.verify import DEFAULT_PARSED_PER_SHARD, summary
from vpmoe.data_curation.checks.verify import verify as find_faults
from vpmoe.data_curation.conversations.app import convert, write_manifest
from vpmoe.data_curation.datasets.app import Overwrite
from vpmoe.data_curation.datasets.app import app as builders
from vpmoe.data_curation.look.inspect import ALTERNATIVES, write_page
from vpmoe.data_curation.look.inspect import inspect as show
from vpmoe.data_curation.tasks import question_texts
from vpmoe.data_curation.tasks import synth_mini as mini
from vpmoe.data_curation.tasks.stories.app import app as stories
from vpmoe.errors import DataError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Datasets: build, verify, inspect, compare, and the generated one."
)
app.add_typer(builders)
app.add_typer(stories)

_Folder = Annotated[Path, typer.Argument(help="folder with a manifest.json")]


app.command()(convert)
app.command("conversations-manifest", hidden=True)(write_manifest)


@app.command()
def verify(
    dataset_dir: _Folder,
    input_dir: Annotated[
        Path | None, typer.Option(help="the conversations it was built from: are they unchanged?")
    ] = None,
    parsed_per_shard: Annotated[
        int, typer.Option(min=0, help="documents of each shard to parse")
    ] = DEFAULT_PARSED_PER_SHARD,
) -> None:
    """Re-hash and re-check a dataset (token files or conversations); lists every fault, exit code 2 if there is one."""
    faults = find_faults(dataset_dir, input_dir=input_dir, parsed_per_shard=parsed_per_shard)
    if faults:
        raise DataError(f"{len(faults)} faults\n" + "\n".join(faults), source=str(dataset_dir))
    typer.echo(f"{dataset_dir}: sound; {summary(dataset_dir)}")


@app.command()
def inspect(
    dataset_dir: _Folder,
    split: Annotated[str, typer.Option(help="train or valid")] = "train",
    count: Annotated[int, typer.Option(min=0, help="documents to show; 0 for the figures alone")] = 3,
    start: Annotated[int, typer.Option(help="number of the first document shown")] = 0,
    alternatives: Annotated[
        int, typer.Option(min=0, help="of a scored dataset: what its teacher finds likely at each token; 0 for none")
    ] = ALTERNATIVES,
    html: Annotated[Path | None, typer.Option(help="write a page of its own to this file instead")] = None,
) -> None:
    """Show a dataset's figures, histograms of lengths, and decoded documents, each span in its colour; and what a
    teacher thinks of each token, where one was asked."""
    if html is None:
        show(dataset_dir, Console(), split=split, count=count, start=start, alternatives=alternatives)
        return
    write_page(dataset_dir, html, split=split, count=count, start=start, alternatives=alternatives)
    typer.echo(f"{html} written")


@app.command()
def stats(
    first: _Folder,
    second: _Folder,
    split: Annotated[str, typer.Option(help="train or valid")] = "train",
    sample: Annotated[
        int, typer.Option(help="documents of each to read for lengths and tokens, taken evenly; 0 for all")
    ] = DEFAULT_DOCUMENTS,
    top: Annotated[int, typer.Option(min=0, help="differing tokens to list")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Compare two datasets: sizes, spans, lengths, vocabularies, and the tokens that tell them apart."""
    compared = comparison.compare(first, second, split=split, limit=sample, top=top)
    if as_json:
        typer.echo(json.dumps(compared, indent=2))
    else:
        comparison.show(compared, Console())


@app.command("synth-mini")
def synth_mini(
    output_dir: Annotated[Path, typer.Option(help="folder to write")],
    rows: Annotated[int, typer.Option(help="rows of the pool (train and valid)")] = 20_000,
    seed: Annotated[int, typer.Option(help="another seed draws other rows; the test questions stay")] = 1,
    families: Annotated[str, typer.Option(help="name=weight,name=weight")] = mini.DEFAULT_MIX,
    levels: Annotated[str, typer.Option(help="family=level|level,...; every level of the families not named")] = "",
    languages: Annotated[str, typer.Option(help="of en,de,fr; rows are in one of these")] = "en",
    slips: Annotated[
        float, typer.Option(help="share of the pool's digits that are any digit, in derivations and answers")
    ] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace rows of another seed or size")] = False,
) -> None:
    """Generate rows of SYNTH's schema: small tasks with a written derivation and an answer that can be checked."""
    made = mini.generate(
        output_dir,
        rows=rows,
        seed=seed,
        families=mini.parse_mix(families),
        levels=mini.parse_levels(levels),
        languages=mini.parse_languages(languages),
        slips=slips,
        overwrite=overwrite,
        say=typer.echo,
    )
    typer.echo(
        f"{output_dir}: {made['rows']:,} rows, {made['test_questions']:,} test questions\n"
        f"  build with --valid-fraction {mini.VALID_FRACTION} (or another multiple of it): "
        "then no question is in two splits"
    )


@app.command("question-texts")
def question_texts_(
    input_dir: Annotated[Path, typer.Option(help="rows of vpmoe data synth-mini")],
    output_dir: Annotated[Path, typer.Option(help="folder to write")],
    overwrite: Overwrite = False,
) -> None:
    """Write rows as plain text, a question and its answer each: what a model without conversations learns."""
    made = question_texts.write_texts(input_dir, output_dir, overwrite=overwrite, say=typer.echo)
    typer.echo(f"{output_dir}: " + ", ".join(f"{count:,} texts in {name}" for name, count in made.items()))
