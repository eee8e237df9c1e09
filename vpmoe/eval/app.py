"""``vpmoe sample``, ``vpmoe chat`` and ``vpmoe eval ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpmoe.errors import DataError
from vpmoe.eval.suites.app import (
    CompileOption,
    DeveloperOption,
    Int8Option,
    Overwrite,
    PassageOption,
    PlainOption,
    StoreOption,
    SystemOption,
    WhereArgument,
    canaries,
    core8,
    lm_eval,
    stories,
    text,
)
from vpmoe.eval.suites.report_app import compare, report
from vpmoe.harmony.prompts import ReasoningEffort

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Evaluate a model.")
sample_app = typer.Typer(add_completion=False)
chat_app = typer.Typer(add_completion=False)

TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 is greedy")]
TopPOption = Annotated[float, typer.Option(help="draw among the most likely tokens of this total probability")]
SeedOption = Annotated[int, typer.Option(help="of the draw, with a temperature")]
TopKOption = Annotated[int | None, typer.Option(min=1, help="draw among so many most likely tokens")]
MinPOption = Annotated[float, typer.Option(help="leave out tokens less likely than this times the likeliest")]
RememberOption = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="store of your own that a mixture reads, and that takes in each conversation that has ended; begins as a "
        "copy of the run's",
    ),
]
OnlyValidOption = Annotated[bool, typer.Option(help="let nothing but valid Harmony be chosen")]


@sample_app.command()
def sample(
    where: WhereArgument,
    question: Annotated[str, typer.Argument(help="what the user asks")],
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="stop after so many tokens")] = 256,
    seed: SeedOption = 0,
    top_k: TopKOption = None,
    min_p: MinPOption = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="answers, each with a draw of its own")] = 1,
    logprobs: Annotated[bool, typer.Option(help="print log p of each token: the model's own, and of the draw")] = False,
    routing: Annotated[bool, typer.Option(help="print the weights of a mixture's experts at each token")] = False,
    only_valid: OnlyValidOption = False,
    int8: Int8Option = False,
    store: StoreOption = None,
    remember: RememberOption = None,
    compiled: CompileOption = False,
    system: SystemOption = None,
    developer: DeveloperOption = None,
    plain: PlainOption = False,
    passage: PassageOption = False,
) -> None:
    """Ask a model one question; prints the conversation with each channel in its colour."""
    from vpmoe.eval.sample import print_sample

    if plain and passage:
        raise DataError("two forms are named", source="--plain and --passage", remedy="give one")

    draw = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    draw |= {"top_k": top_k, "min_p": min_p, "samples": samples}
    print_sample(
        where,
        question,
        draw,
        plain=plain,
        passage=passage,
        system=system,
        developer=developer,
        only_valid=only_valid,
        logprobs=logprobs,
        routing=routing,
        int8=int8,
        store=store,
        remember=remember,
        compiled=compiled,
    )


@chat_app.command("chat")
def talk(
    where: WhereArgument,
    reasoning: Annotated[
        ReasoningEffort | None, typer.Option(help="effort that the system message asks for (default: as it says)")
    ] = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="an answer is cut after so many tokens")] = 1024,
    seed: SeedOption = 0,
    top_k: TopKOption = None,
    min_p: MinPOption = 0.0,
    only_valid: OnlyValidOption = False,
    store: StoreOption = None,
    remember: RememberOption = None,
    int8: Int8Option = False,
    compiled: CompileOption = False,
    system: SystemOption = None,
    developer: DeveloperOption = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of the whole conversation (default: as trained on; 2048 where nobody says)"),
    ] = None,
) -> None:
    """Talk with a model: each line is answered as it is written, analysis dim. Reads a pipe too, one line a turn.

    /reset begins a new conversation, /quit or Ctrl-D ends, Ctrl-C ends an answer. A full context is told, not cut.
    """
    from vpmoe.eval.chat import chat

    draw = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    draw |= {"top_k": top_k, "min_p": min_p}
    chat(
        where,
        draw,
        system=system,
        developer=developer,
        reasoning=reasoning,
        only_valid=only_valid,
        context=context,
        store=store,
        remember=remember,
        int8=int8,
        compiled=compiled,
    )


@app.callback()
def verbs() -> None:
    """Evaluate a model."""


@app.command()
def nano(
    where: WhereArgument,
    questions: Annotated[Path, typer.Option(help="JSONL of held-out rows with answers")] = Path(
        "data/synth_mini/test.jsonl"
    ),
    data_path: Annotated[
        Path | None, typer.Option(help="dataset for the losses (default: the one the run names, where it is there)")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="a model of that vocabulary, to tell the KL to it on the split valid"),
    ] = None,
    system: SystemOption = None,
    developer: DeveloperOption = None,
    plain: PlainOption = False,
    per_family: Annotated[int | None, typer.Option(min=1, help="questions of each family (default: all)")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="a longer generation is cut, and not valid")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts decoded together")] = 64,
    samples: Annotated[int, typer.Option(min=0, help="decoded generations kept in the report")] = 8,
    output: Annotated[Path | None, typer.Option(help="the report (default: reports/eval/nano/CHECKPOINT.json)")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Losses on the valid split, validity and exact answers of greedy generations; writes JSON and a PNG.

    The PNG beside the report shows loss per span and router balance over the steps, and accuracy per family.
    """
    from vpmoe.eval.nano import NanoOptions, evaluate_and_plot

    chosen = NanoOptions(
        questions=questions,
        data_path=data_path,
        teacher=teacher,
        system=system,
        developer=developer,
        plain=plain,
        per_family=per_family,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        samples=samples,
    )
    evaluate_and_plot(where, chosen, output, overwrite=overwrite, progress=lambda line: typer.echo(line, err=True))


@app.command()
def pairs(
    where: WhereArgument,
    output_dir: Annotated[Path, typer.Option(help="folder for pairs.jsonl")],
    rows: Annotated[Path, typer.Option(help="folder of vpmoe data synth-mini")] = Path("data/synth_mini"),
    train: Annotated[int, typer.Option(min=1, help="questions of the split train to ask")] = 1500,
    valid: Annotated[int, typer.Option(min=0, help="questions of the split valid to ask")] = 500,
    valid_fraction: Annotated[float, typer.Option(help="as the model's dataset was built with")] = 0.05,
    system: SystemOption = None,
    developer: DeveloperOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="a longer answer is cut, and gives no pair")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts decoded together")] = 64,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace what was made of another model or other questions")
    ] = False,
) -> None:
    """Preference pairs of a model's own making: right answers against the wrong ones that it gives greedily.

    Make a dataset of them with vpmoe data build-pairs --id-field synth_id, the same --valid-fraction, and
    --prompts-of the dataset that the model was trained on.
    """
    from vpmoe.eval.nano import NanoOptions
    from vpmoe.eval.pairs import make_pairs

    options = NanoOptions(
        rows, system=system, developer=developer, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    counts = {"train": train, "valid": valid}
    made = make_pairs(
        where,
        rows,
        output_dir,
        counts=counts,
        valid_fraction=valid_fraction,
        options=options,
        overwrite=overwrite,
        say=lambda line: typer.echo(line, err=True),
    )
    typer.echo(
        f"{output_dir}: {made['pairs']} pairs of {made['questions']} questions; {made['right']} were answered rightly, "
        f"{made['invalid']} in no valid form"
    )


app.command()(core8)
app.command()(canaries)
app.command()(text)
app.command()(stories)
app.command("lm-eval")(lm_eval)
app.command()(report)
app.command()(compare)
