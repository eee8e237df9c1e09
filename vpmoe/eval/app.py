"""``vpmoe sample`` and ``vpmoe eval ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpmoe.eval.nano import NanoOptions, evaluate_and_plot
from vpmoe.eval.sample import Draw, print_sample

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Evaluate a trained run.")
sample_app = typer.Typer(add_completion=False)

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="a run directory (its newest checkpoint) or one checkpoint in it")
]
ConversationsOption = Annotated[
    Path,
    typer.Option(help="conversations that the dataset was built from; their system and developer messages are used"),
]
DataPathOption = Annotated[Path | None, typer.Option(help="the built dataset (default: the one the run names)")]


@sample_app.command()
def sample(
    run: RunArgument,
    question: Annotated[str, typer.Argument(help="what the user asks")],
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="draw among the most likely tokens of this total probability")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="stop after so many tokens")] = 256,
    seed: Annotated[int, typer.Option(help="of the draw, with a temperature")] = 0,
    conversations: ConversationsOption = Path("data/synth_harmony"),
    data_path: DataPathOption = None,
) -> None:
    """Ask a trained run one question; prints the conversation with each channel in its colour."""
    print_sample(run, question, Draw(temperature, top_p, max_new_tokens, seed), conversations, data_path)


@app.callback()
def verbs() -> None:
    """Evaluate a trained run."""


@app.command()
def nano(
    run: RunArgument,
    questions: Annotated[Path, typer.Option(help="JSONL of held-out rows with answers")] = Path(
        "data/synth_mini/test.jsonl"
    ),
    conversations: ConversationsOption = Path("data/synth_harmony"),
    data_path: DataPathOption = None,
    per_family: Annotated[int | None, typer.Option(min=1, help="questions of each family (default: all)")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="a longer generation is cut, and not valid")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts decoded together")] = 64,
    samples: Annotated[int, typer.Option(min=0, help="decoded generations kept in the report")] = 8,
    output: Annotated[
        Path | None, typer.Option(help="the report (default: evaluation.json in the run's directory)")
    ] = None,
) -> None:
    """Losses on the valid split, Harmony validity and exact answers of greedy generations; writes JSON and a PNG.

    The PNG beside the report shows loss per span and router balance over the steps, and accuracy per family.
    """
    chosen = NanoOptions(
        questions=questions,
        conversations=conversations,
        data_path=data_path,
        per_family=per_family,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        samples=samples,
    )
    evaluate_and_plot(run, chosen, output, progress=lambda line: typer.echo(line, err=True))
