"""``vpmoe <verb>``: every job before and after training. Training itself is ``scripts/train.sh CONFIG``.

Nothing heavy is imported before a verb needs it, so that ``vpmoe --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vpmoe.errors import VpmoeError

_HELP = """From nothing to a trained nano vpMoE, and what comes before and after any training.

[bold]First steps[/bold]

  vpmoe quickstart                                  train one in minutes

  vpmoe data inspect data/megatron/synth_kd_v1      what it was taught

  vpmoe sample runs/quickstart "What is 37 + 58?"   what it has learned

  vpmoe model describe configs/vpmoe_stage1.yaml    how the real one is built, and how large it is

Training is scripts/train.sh CONFIG [--any-field value]; its --help explains every field.

Exit codes: 0 done; 1 done, but a stated target was missed; 2 a mistake that the message helps to mend.
"""


class LateVerbs(TyperGroup):
    """Verbs of a room, imported when the first of them is looked for."""

    room = ""

    @cached_property
    def _verbs(self) -> TyperGroup:
        verbs = typer.main.get_command(importlib.import_module(f"vpmoe.{self.room}.app").app)
        assert isinstance(verbs, TyperGroup)
        return verbs

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the verbs."""
        return self._verbs.list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb of a name; None if there is none."""
        return self._verbs.get_command(ctx, cmd_name)


class DataVerbs(LateVerbs):
    """``vpmoe data ...``."""

    room = "data_curation"


class ModelVerbs(LateVerbs):
    """``vpmoe model ...``."""

    room = "describe"


class HFVerbs(LateVerbs):
    """``vpmoe hf ...``."""

    room = "hf"


class UpcycleVerbs(LateVerbs):
    """``vpmoe upcycle ...``."""

    room = "upcycle"


app = typer.Typer(
    name="vpmoe",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
eval_app = typer.Typer(help="Evaluate a trained run.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="The o200k rank file behind every vocabulary.", no_args_is_help=True)
app.add_typer(typer.Typer(), name="data", cls=DataVerbs, help="Make, check and look at datasets.", no_args_is_help=True)
app.add_typer(
    typer.Typer(), name="model", cls=ModelVerbs, help="Look at what a configuration builds.", no_args_is_help=True
)
app.add_typer(typer.Typer(), name="hf", cls=HFVerbs, help="To HF directories and back.", no_args_is_help=True)
app.add_typer(
    typer.Typer(), name="upcycle", cls=UpcycleVerbs, help="Climb from Qwen3-0.6B to vpMoE.", no_args_is_help=True
)
app.add_typer(eval_app, name="eval")
app.add_typer(tokenizer_app, name="tokenizer")

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="a run directory (its newest checkpoint) or one checkpoint in it")
]
ConversationsOption = Annotated[
    Path,
    typer.Option(help="conversations that the dataset was built from; their system and developer messages are used"),
]
DataPathOption = Annotated[Path | None, typer.Option(help="the built dataset (default: the one the run names)")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks; may stand anywhere on the line")] = False,
) -> None:
    """Options of every verb; ``--debug`` is taken off the line by :func:`main` and stands here for ``--help``."""


@app.command()
def quickstart(
    seed: Annotated[int | None, typer.Option(help="of model and data order (default: the config's)")] = None,
    run_name: Annotated[str | None, typer.Option(help="the run goes to runs/NAME (default: the settings')")] = None,
    train_iters: Annotated[int | None, typer.Option(min=1, help="train another number of steps")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="do this step again even if it is done: tokenizer, data, train or evaluate"),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="put data/, runs/ and reports/ here (default: the checkout)")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="another settings file (default: configs/nano/quickstart.toml)")
    ] = None,
) -> None:
    """Make the embedded dataset, train a nano vpMoE on it, evaluate it, write reports/quickstart.

    Steps that are done and still valid are skipped; after an interruption the same command goes on where it stopped.
    """
    from vpmoe.quickstart.run import Request, run_quickstart

    request = Request(
        seed=seed,
        run_name=run_name,
        train_iters=train_iters,
        force=tuple(force or ()),
        work_dir=work_dir,
        settings=settings,
    )
    raise typer.Exit(run_quickstart(request))


@app.command()
def ladder(
    config: Annotated[Path, typer.Option(help="the ladder: objects, target, evaluation")] = Path(
        "configs/upcycle/ladder.toml"
    ),
    out: Annotated[Path | None, typer.Option(help="folder of the report (default: the ladder's)")] = None,
    first: Annotated[int, typer.Option("--from", min=0, help="rung to begin with; those below have to be there")] = 0,
    last: Annotated[int | None, typer.Option("--to", min=0, help="rung to end with (default: the last)")] = None,
    force: Annotated[bool, typer.Option("--force", help="make again what is out of date or damaged")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what is done and what is due; make nothing")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
) -> None:
    """Climb the whole ladder: make every object, evaluate every rung, write one report (JSON, table, plot).

    What is done and still valid is skipped; after an interruption the same command goes on where it stopped.
    """
    from vpmoe.ladder.climb import Request, climb, listing

    request = Request(config, reports=out, first=first, last=last, force=force, quiet=quiet)
    if dry_run:
        typer.echo("\n".join(listing(request)))
        return
    climb(request, lambda line: typer.echo(line, err=True))
    folder = request.folder()
    typer.echo((folder / "ladder.md").read_text())
    typer.echo(f"{folder / 'ladder.json'}, ladder.md and ladder.png written")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def param_count(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="a run's YAML; --field-name value after it overrides a field")],
) -> None:
    """Count the parameters of a configuration, part by part; the same as ``vpmoe model param-count``."""
    from vpmoe.describe.app import print_parameter_count

    print_parameter_count(config, context.args)


@app.command()
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
    from vpmoe.eval.sample import Draw, print_sample

    print_sample(run, question, Draw(temperature, top_p, max_new_tokens, seed), conversations, data_path)


@eval_app.callback()
def eval_verbs() -> None:
    """Evaluate a trained run."""


@eval_app.command()
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
    from vpmoe.eval.nano import NanoOptions, evaluate_and_plot

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


@tokenizer_app.callback()
def tokenizer_verbs() -> None:
    """The o200k rank file behind every vocabulary."""


@tokenizer_app.command()
def install(
    output_dir: Annotated[Path, typer.Option(help="where every command looks for it")] = Path("data/tokenizer"),
    tokenizer_model: Annotated[
        Path | None, typer.Option(help="take this file instead of the package bpe-openai's")
    ] = None,
) -> None:
    """Put the o200k rank file in place: offline, out of the package bpe-openai, its hash checked."""
    from vpmoe.tokenizer import rank_file

    path = rank_file.install(output_dir, configured=tokenizer_model)
    typer.echo(f"{path}: sha256 {rank_file.SHA256} checked")


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code; a user's error is one message on stderr, without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        app(args=[word for word in words if word != "--debug"], prog_name="vpmoe")
    except VpmoeError as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as end:
        return _exit_code(end)
    finally:
        _flush()
    return 0


def _exit_code(end: SystemExit) -> int:
    if end.code is None:
        return 0
    return end.code if isinstance(end.code, int) else 1


def _flush() -> None:
    """Write what is buffered; a reader that has gone (``vpmoe ... | head``) is no error worth a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
