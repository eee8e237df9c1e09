"""``vpmoe data stories`` and ``story-prompts``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpmoe.data_curation.tasks.stories import corpus, prompts
from vpmoe.data_curation.tasks.stories.corpus import TEST_FRACTION, VALID_FRACTION

app = typer.Typer()
_Output = Annotated[Path, typer.Option(help="folder to write train.jsonl, valid.jsonl and test.jsonl into")]
_Seed = Annotated[int, typer.Option(help="another seed draws other rows; what is a test row stays one")]
_Valid = Annotated[float, typer.Option(help="share of the split valid")]
_Test = Annotated[float, typer.Option(help="share of the split test")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace rows of another seed or size")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]


@app.command()
def stories(
    output_dir: _Output,
    rows: Annotated[int, typer.Option(help="stories, each of another plot")] = 100_000,
    seed: _Seed = 1,
    valid_fraction: _Valid = VALID_FRACTION,
    test_fraction: _Test = TEST_FRACTION,
    overwrite: _Overwrite = False,
    quiet: _Quiet = False,
) -> None:
    """Generate a corpus of small children's stories with plots: texts of 80 to 200 words, no plot twice."""
    counts = corpus.generate(
        output_dir,
        rows=rows,
        seed=seed,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        overwrite=overwrite,
        quiet=quiet,
        say=typer.echo,
    )
    typer.echo(_told(output_dir, counts))


@app.command()
def story_prompts(
    output_dir: _Output,
    rows: Annotated[int, typer.Option(help="prompts, each of another plot")] = 20_000,
    seed: _Seed = 1,
    pairs: Annotated[bool, typer.Option("--pairs", help="pairs: the right protagonist against a wrong one")] = False,
    valid_fraction: _Valid = VALID_FRACTION,
    test_fraction: _Test = TEST_FRACTION,
    overwrite: _Overwrite = False,
    quiet: _Quiet = False,
) -> None:
    """Generate instructions for stories: protagonist, theme, words that have to come and words that must not."""
    counts = prompts.generate(
        output_dir,
        rows=rows,
        seed=seed,
        pairs=pairs,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        overwrite=overwrite,
        quiet=quiet,
        say=typer.echo,
    )
    typer.echo(_told(output_dir, counts))


def _told(output_dir: Path, counts: dict[str, int]) -> str:
    return f"{output_dir}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items())
