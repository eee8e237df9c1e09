"""``vpmoe <verb>``: the one front end. Every room has an ``app.py`` with its verbs; here they get their place.

A room is imported when one of its verbs is called, so that ``vpmoe --help`` answers at once.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted import is no traceback

import importlib
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from megatron_vpmoe.errors import is_utf8
from vpmoe.errors import VpmoeError, of_the_system

_HELP = """From nothing to a trained nano vpMoE, and what comes before and after any training.

[bold]First steps[/bold]

  vpmoe quickstart                                  train one in minutes

  vpmoe data inspect data/megatron/synth_kd_v1      what it was taught

  vpmoe sample runs/quickstart "What is 37 + 58?"   what it has learned

  vpmoe model describe configs/vpmoe_stage1.yaml    how the real one is built, and how large it is

Exit codes: 0 done; 1 done, but a stated target was missed; 2 a mistake that the message helps to mend.
"""

VERBS = {
    "quickstart": ("vpmoe.quickstart.app:app", "Make data, train a nano vpMoE on it, evaluate it, write a report."),
    "data": ("vpmoe.teacher.app:app", "Make, check, look at and annotate datasets."),
    "tokenizer": (
        "vpmoe.data_curation.datasets.app:tokenizer_app",
        "The o200k rank file, and your own vocabularies.",
    ),
    "train": ("vpmoe.trainer:train", "Train the run that a YAML file describes; --help explains every field."),
    "plan": ("vpmoe.plan.app:app", "Predict a run on machines: layouts, step time, memory, MFU, days, cost."),
    "profile": ("vpmoe.trainer:profile", "Profile training steps on mock data; --help lists the variables."),
    "sample": ("vpmoe.eval.app:sample_app", "Ask a model one question."),
    "chat": ("vpmoe.eval.app:chat_app", "Talk with a model."),
    "eval": ("vpmoe.eval.app:app", "Evaluate a model on questions whose answers can be checked."),
    "app": ("vpmoe.app.app:app", "Look at runs, routing, models, data and reports in a browser."),
    "model": ("vpmoe.describe.app:app", "Look at what a configuration builds."),
    "runs": ("vpmoe.runs.app:app", "The runs so far: list, compare, plot, export, ask in SQL, tag, remove."),
    "make-plots": ("vpmoe.runs.figures_app:app", "All figures of runs and of their models, over many prompts."),
    "checkpoint": ("vpmoe.checkpoints.app:app", "Inspect a checkpoint, verify its files, compare two, export a step."),
    "hf": ("vpmoe.hf.app:app", "To HF directories and back."),
    "upcycle": ("vpmoe.upcycle.app:app", "Climb from Qwen3-0.6B to vpMoE, object by object."),
    "rl-nano": ("vpmoe.quickstart.app:rl_app", "What rewards and preferences make of a nano vpMoE; a report."),
    "distil-nano": ("vpmoe.quickstart.app:distil_app", "What a teacher makes of a nano vpMoE; a report."),
    "nano-moe": ("vpmoe.quickstart.app:moe_app", "A story model from tokenizer to DPO; a report."),
    "think-nano": ("vpmoe.quickstart.app:think_app", "Experts of three kinds, alone and mixed; a report."),
    "ladder": ("vpmoe.ladder.app:app", "Climb the whole ladder: make every object, evaluate it, write one report."),
}
"""Verb -> the module and its typer app, and what the list of verbs says of it."""


def command_of(verb: str) -> Any:
    """The click command of one of ``VERBS``; imports its room."""
    module, variable = VERBS[verb][0].split(":")
    return typer.main.get_command(getattr(importlib.import_module(module), variable))


class Verbs(TyperGroup):
    """The verbs by name alone; a called one is imported."""

    def __init__(self, **attributes: Any) -> None:
        listed = {name: TyperCommand(name=name, help=text) for name, (_, text) in VERBS.items()}
        super().__init__(**{**attributes, "commands": listed})

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of ``VERBS``."""
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The called verb; an unknown one is refused, with the nearest names."""
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        return name, command_of(name), rest


app = typer.Typer(
    name="vpmoe",
    cls=Verbs,
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks; may stand anywhere on the line")] = False,
) -> None:
    """Options of every verb; ``--debug`` is taken off the line by :func:`main` and stands here for ``--help``."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code; a user's error is one message on stderr, without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        if strange := [word for word in words if not is_utf8(word)]:
            raise VpmoeError("not UTF-8", source=ascii(strange[0]), remedy="rename it: libraries open no such name")
        app(args=[word for word in words if word != "--debug"], prog_name="vpmoe", obj=debug)
    except (VpmoeError, OSError) as error:
        shown = of_the_system(error) if isinstance(error, OSError) else error
        if debug:
            traceback.print_exc()
        else:
            print(f"{type(error).__name__}: {shown}", file=sys.stderr)
        return shown.exit_code
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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
