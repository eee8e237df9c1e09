"""``vpmoe quickstart``, ``vpmoe rl-nano``, ``vpmoe distil-nano``, ``vpmoe nano-moe`` and ``vpmoe think-nano``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
app = typer.Typer(add_completion=False)
rl_app = typer.Typer(add_completion=False)
distil_app = typer.Typer(add_completion=False)
moe_app = typer.Typer(add_completion=False)
think_app = typer.Typer(add_completion=False)

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="replace what was made of other settings, data or code")
]
WorkOption = Annotated[Path | None, typer.Option(help="put data/, runs/ and reports/ here (default: the checkout)")]


@app.command()
def quickstart(
    seed: Annotated[int | None, typer.Option(help="of model and data order (default: the config's)")] = None,
    run_name: Annotated[str | None, typer.Option(help="the run goes to runs/NAME (default: the settings')")] = None,
    train_iters: Annotated[int | None, typer.Option(min=1, help="train another number of steps")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="do this step again even if it is done: tokenizer, data, train or evaluate"),
    ] = None,
    overwrite: OverwriteOption = False,
    work_dir: WorkOption = None,
    settings: Annotated[
        Path | None, typer.Option(help="another settings file (default: configs/nano/quickstart.toml)")
    ] = None,
) -> None:
    """Make the embedded dataset, train a nano vpMoE on it, evaluate it, write reports/quickstart.

    Steps that are done and still valid are skipped; after an interruption the same command goes on where it stopped.
    """
    from vpmoe.quickstart.plan import Plan
    from vpmoe.quickstart.run import run_quickstart

    plan = Plan.of(
        ROOT,
        seed=seed,
        run_name=run_name,
        train_iters=train_iters,
        force=force or (),
        overwrite=overwrite,
        work_dir=work_dir,
        settings=settings,
    )
    raise typer.Exit(run_quickstart(plan))


SeedsOption = Annotated[
    list[int] | None,
    typer.Option("--seed", help="of all trainings; may be given several times (default: the config's)"),
]


@rl_app.command()
def rl_nano(
    seed: SeedsOption = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="do this step again: tokenizer, data, sft, grpo, pairs or dpo"),
    ] = None,
    overwrite: OverwriteOption = False,
    work_dir: WorkOption = None,
    settings: Annotated[
        Path | None, typer.Option(help="another settings file (default: configs/nano/rl_nano.toml)")
    ] = None,
) -> None:
    """Train a nano vpMoE short of mastery, then from its weights by rewards and by preferences; write reports/rl_nano.

    Steps that are done and still valid are skipped; after an interruption the same command goes on where it stopped.
    """
    from vpmoe.quickstart.rl import plan_of, run_rl_nano

    wishes = {"seeds": seed or (), "force": force or (), "overwrite": overwrite}
    raise typer.Exit(run_rl_nano(plan_of(ROOT, **wishes, work_dir=work_dir, settings=settings)))


@distil_app.command()
def distil_nano(
    seed: SeedsOption = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP",
            help="do this step again: tokenizer, data, teacher, store, start, ce, stored_topk, live_topk or on_policy",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    work_dir: WorkOption = None,
    settings: Annotated[
        Path | None, typer.Option(help="another settings file (default: configs/nano/distil_nano.toml)")
    ] = None,
) -> None:
    """Train a teacher, then students of it: by texts alone, by its stored and its live top K, each then on-policy.

    Writes reports/distil_nano: exact answers, KL to the teacher, and what each student took. Steps that are done and
    still valid are skipped; after an interruption the same command goes on where it stopped.
    """
    from vpmoe.quickstart.distil import plan_of, run_distil_nano

    wishes = {"seeds": seed or (), "force": force or (), "overwrite": overwrite}
    raise typer.Exit(run_distil_nano(plan_of(ROOT, **wishes, work_dir=work_dir, settings=settings)))


@moe_app.command()
def nano_moe(
    full: Annotated[
        bool, typer.Option("--full", help="the full budget: hours, with data, runs and a report of its own")
    ] = False,
    seed: SeedsOption = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP", help="do this step again: stories, tokenizer, data, pretrain, sft, dpo, evaluate or plots"
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    work_dir: WorkOption = None,
    settings: Annotated[
        Path | None, typer.Option(help="another settings file (default: configs/nano_moe/pipeline.toml)")
    ] = None,
) -> None:
    """Make a small mixture of experts for stories from nothing: tokenizer, pretraining, SFT, DPO; a report.

    Writes reports/nano_moe: perplexity, and how often stories have the words, the protagonist and no banned word.
    Steps that are done and still valid are skipped; after an interruption the same command goes on where it stopped.
    """
    from vpmoe.quickstart.stories import plan_of, run_nano_moe

    wishes = {"seeds": seed or (), "force": force or (), "overwrite": overwrite}
    raise typer.Exit(run_nano_moe(plan_of(ROOT, full=full, **wishes, work_dir=work_dir, settings=settings)))


@think_app.command()
def think_nano(
    seed: SeedsOption = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP",
            help="do this step again: tokenizer, data, transformer, state_space, diffuser, store, mixture or alone",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    work_dir: WorkOption = None,
    settings: Annotated[
        Path | None, typer.Option(help="another settings file (default: configs/think/nano/pipeline.toml)")
    ] = None,
) -> None:
    """Train a transformer, a state space model and a diffuser on five domains, then a mixture of the three; a report.

    Writes reports/think_nano: the mixture against each expert alone at equal tokens, with and without a store of
    vectors, and whom the router asks in each domain. Steps that are done and still valid are skipped; after an
    interruption the same command goes on where it stopped.
    """
    from vpmoe.quickstart.think import plan_of, run_think_nano

    wishes = {"seeds": seed or (), "force": force or (), "overwrite": overwrite}
    raise typer.Exit(run_think_nano(plan_of(ROOT, **wishes, work_dir=work_dir, settings=settings)))
