"""``vpmoe plan``: every layout of a run on machines that may not be there, and this CPU measured for predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_vpmoe.config import load_config
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.files import json_bytes, write_atomically
from megatron_vpmoe.planning.here import here
from megatron_vpmoe.planning.layouts import Plan, as_configured, plan, planned
from megatron_vpmoe.runtime.machines import KIND, calibrated_path, fleet
from megatron_vpmoe.software import provenance
from vpmoe.errors import DataError
from vpmoe.plan.report import Figures, figures, plan_json
from vpmoe.plan.table import print_plan
from vpmoe.progress import Progress
from vpmoe.steps import check_replaceable

app = typer.Typer(add_completion=False)
_MOST_ROWS = 1000


@app.command(name="plan", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_plan(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="a run's YAML; --field-name value after it overrides a field")
    ] = None,
    gpus: Annotated[
        list[str] | None,
        typer.Option(
            "--gpus", help="COUNTxMACHINE, such as 8xH100; may be given again. Without: this machine, as configured"
        ),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of one GPU for one hour; adds the run's cost")] = None,
    top: Annotated[int, typer.Option(min=1, max=_MOST_ROWS, help="layouts that are shown")] = 8,
    show_all: Annotated[bool, typer.Option("--all", help="show every layout, those that do not fit too")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="write every layout to this file")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(dir_okay=False, help="draw the shown layouts' seconds to this file, .png or .svg")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="measure this CPU (under a minute), for predictions of runs on it")
    ] = False,
) -> None:
    """Predict a run's step on machines: layouts by speed, with memory, MFU, days and cost.

    Nothing is run: FLOPs, bytes and launches come from formulas, rates from the table runtime/machines.toml, whose
    sources are printed; most efficiencies there are assumed. --calibrate writes what it measures to
    $XDG_CACHE_HOME/vpmoe (~/.cache/vpmoe), a file for each host. docs/performance.md explains the model.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    if calibrate:
        _calibrate(console)
        if config is None:
            return
    if config is None:
        raise ConfigError(
            "no configuration given", source="command line", remedy="vpmoe plan configs/vpmoe_stage1.yaml --gpus 8xH100"
        )
    cfg = load_config(config, context.args)
    fleets = [fleet(text) for text in dict.fromkeys(gpus or ())]
    for path in (path for path in (json_file, picture) if path is not None):
        check_replaceable(path, *(('"kind": "vpmoe plan"',) if path == json_file else ()))
    plans: list[Plan] = []
    if not fleets:
        machine = here(cfg)
        layout = as_configured(cfg, machine)
        plans.append(Plan(machine, [planned(layout, layout.applied(cfg), machine, is_own=True)]))
    for each in fleets:
        with Progress(f"layouts on {each}", None, unit="layouts") as progress:
            plans.append(plan(cfg, each, lambda _done, _total, progress=progress: progress.add(1)))
    numbers: list[list[Figures]] = [figures(cfg, made, price) for made in plans]
    for made, of_plan in zip(plans, numbers, strict=True):
        print_plan(cfg, str(config), made, of_plan, console, rows=None if show_all else top)
    if json_file is not None:
        write_atomically(json_file, json_bytes(plan_json(cfg, str(config), plans, numbers)))
        typer.echo(f"{json_file} written")
    if picture is not None:
        from vpmoe.plan.picture import write_picture

        write_picture(plans, numbers, picture, rows=top)
        typer.echo(f"{picture} written")


def _calibrate(console: Console) -> None:
    """Measure this CPU and keep what was found."""
    from megatron_vpmoe.planning.calibrate import measure

    path = calibrated_path()
    check_replaceable(path, KIND)
    machines = measure(lambda doing: console.print(f"measuring {doing}"))
    figures_of = [machine.model_dump(mode="json") for machine in machines]
    stored = {"kind": KIND, "provenance": provenance(), "machines": figures_of}
    try:
        write_atomically(path, json_bytes(stored))
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}",
            source="--calibrate",
            remedy="set XDG_CACHE_HOME to a folder of yours",
        ) from error
    for machine in machines:
        rates = f"{machine.fp32_tflops * 1e3:,.0f} GFLOP/s in fp32, {machine.bf16_tflops * 1e3:,.0f} in bf16"
        moving = f"{machine.memory_gb_s:,.1f} GB/s, between processes {machine.link_gb_s:,.2f}"
        console.print(f"threads {machine.threads}: {rates}, {moving}, {machine.kernel_us:,.1f} us an operation")
    console.print(f"{path} written", soft_wrap=True)
