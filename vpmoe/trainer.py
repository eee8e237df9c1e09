"""``vpmoe train`` and ``vpmoe profile``: the command lines of ``megatron_vpmoe``, which have their own help."""

from __future__ import annotations

import typer

train = typer.Typer(add_completion=False)
profile = typer.Typer(add_completion=False)
_AS_THEY_ARE = {"allow_extra_args": True, "ignore_unknown_options": True}


@train.command(name="train", context_settings=_AS_THEY_ARE, add_help_option=False)
def run_training(context: typer.Context) -> None:
    """Train the run that a YAML file describes."""
    from megatron_vpmoe.launch.__main__ import main

    raise typer.Exit(main([*context.args, *(["--debug"] if context.obj else [])]))


@profile.command(name="profile", context_settings=_AS_THEY_ARE, add_help_option=False)
def run_profile(context: typer.Context) -> None:
    """Profile training steps on mock data."""
    from megatron_vpmoe.profiling.__main__ import main

    raise typer.Exit(main(context.args))
