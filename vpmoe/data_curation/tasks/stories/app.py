"""``vpmoe data stories`` and ``story-prompts``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from vpmoe.data_curation.datasets.options import Quiet, flags
from vpmoe.data_curation.tasks.stories import corpus, instructions
from vpmoe.data_curation.tasks.stories.endpoint import KEY_VARIABLE, Settings
from vpmoe.data_curation.tasks.stories.plots import DEFAULT_SHARES, Shares
from vpmoe.data_curation.tasks.stories.writing import Writing
from vpmoe.errors import DataError

app = typer.Typer()


@dataclass(frozen=True)
class Made:
    """Where rows go, and what decides them but their number."""

    output_dir: Annotated[Path, typer.Option(help="folder to write train.jsonl, valid.jsonl and test.jsonl into")]
    seed: Annotated[int, typer.Option(help="another seed draws other rows; what is a test row stays one")] = 1
    valid_fraction: Annotated[float, typer.Option(help="share of the split valid")] = DEFAULT_SHARES.valid
    test_fraction: Annotated[float, typer.Option(help="share of the split test")] = DEFAULT_SHARES.test
    choices: Annotated[
        int | None,
        typer.Option(min=3, help="a smaller world: at most so many names, kinds, places and other words of each list"),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace rows of another seed or size")] = False
    quiet: Quiet = False

    def options(self) -> dict[str, Any]:
        """As what writes rows takes them."""
        given = asdict(self)
        return {"shares": Shares(given.pop("valid_fraction"), given.pop("test_fraction")), "say": typer.echo, **given}


@app.command()
@flags
def stories(
    made: Made,
    *,
    rows: Annotated[int, typer.Option(help="stories, each of another plot")] = 100_000,
    readers: Annotated[
        float,
        typer.Option(min=0.0, max=0.99, help="share of the training rows that are first readers: short, of few words"),
    ] = 0.0,
) -> None:
    """Generate a corpus of small children's stories with plots: texts of 130 to 200 words, no plot twice."""
    counts = corpus.generate(rows=rows, readers=readers, **made.options())
    typer.echo(_told(made.output_dir, counts))


@dataclass(frozen=True)
class Writer:
    """Who writes the stories instead of the templates."""

    writer: Annotated[
        str | None,
        typer.Option(
            help=f"OpenAI-compatible address of a model that writes the stories; its key comes from {KEY_VARIABLE}"
        ),
    ] = None
    writer_model: Annotated[str | None, typer.Option(help="name of the model there")] = None
    writer_tries: Annotated[
        int, typer.Option(min=1, help="times that a story is asked for; then its row is dropped")
    ] = 3
    writer_concurrency: Annotated[int, typer.Option(min=1, help="requests under way")] = 8
    writer_timeout: Annotated[float, typer.Option(min=0.1, help="seconds for an answer")] = 120.0
    judge: Annotated[bool, typer.Option("--judge", help="the model also says whether a story is of its theme")] = False

    def writing(self) -> Writing | None:
        """None: the templates write; raises :class:`DataError` where an option would do nothing."""
        if self.writer is None:
            if idle := [option.name for option in fields(self) if getattr(self, option.name) != option.default]:
                named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
                raise DataError("there is no writer", source=named, remedy="name one with --writer")
            return None
        if not self.writer_model:
            raise DataError("no model is named", source="--writer", remedy="name one with --writer-model")
        endpoint = Settings(self.writer, self.writer_model, self.writer_concurrency, self.writer_timeout)
        return Writing(endpoint, self.writer_tries, self.judge)


@app.command()
@flags
def story_prompts(
    made: Made,
    writer: Writer,
    *,
    rows: Annotated[int, typer.Option(help="prompts, each of another plot")] = 20_000,
    pairs: Annotated[bool, typer.Option("--pairs", help="pairs: the right protagonist against a wrong one")] = False,
    slips: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=0.99,
            help="wrong on purpose: share of the training rows whose hero is of the writer's favourite kind instead of "
            "that asked for; rows of that kind anyway cannot slip",
        ),
    ] = 0.0,
) -> None:
    """Generate instructions for stories: protagonist, theme, words that have to come and words that must not."""
    writing = writer.writing()
    if slips and (pairs or writing):
        named = "--pairs" if pairs else "--writer"
        raise DataError("the templates' instructions alone slip", source=f"--slips, {named}", remedy="leave one out")
    report = instructions.generate(rows=rows, pairs=pairs, slips=slips, writing=writing, **made.options())
    typer.echo(_told(made.output_dir, report["rows"]))
    for name, told in report.get("written", {}).items():
        typer.echo(f"  {name}: {json.dumps(told)}")


def _told(output_dir: Path, counts: dict[str, int]) -> str:
    return f"{output_dir}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items())
