"""A plan for people: the best layouts, why the others are not, and what the figures stand on."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.planning.layouts import Plan, Planned
from megatron_vpmoe.planning.predict import SPLIT
from vpmoe.plan.report import Figures

_HEADS = {"compute": "prod", "memory": "bytes", "launches": "launch", "communication": "comm", "waiting": "wait"}


def print_plan(
    cfg: RunConfig, name: str, made: Plan, numbers: list[Figures], console: Console, *, rows: int | None
) -> None:
    """Print the first ``rows`` layouts (None: all), the configuration's own, and the sources.

    Args:
        cfg: the run.
        name: its file.
        made: layouts in order.
        numbers: of each.
        console: where to.
        rows: how many.
    """
    tokens = cfg.training.global_batch_size * cfg.data.seq_length
    title = f"{name} on {made.fleet}: {tokens:,} tokens a step, {cfg.training.train_iters:,} steps"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layout", no_wrap=True)
    for head in (
        "GiB",
        "step ms",
        *_HEADS.values(),
        *([] if made.fleet.machine.is_cpu else ["MFU %"]),
        "tok/s/GPU",
        "days",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    if with_cost := any(figure.cost is not None for figure in numbers):
        table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("")
    pairs = list(zip(made.layouts, numbers, strict=True))
    shown = [pair for pair in pairs if pair[0].fits][:rows] if rows is not None else pairs
    shown = shown or pairs[:rows]
    shown += [pair for pair in pairs if pair[0].as_configured and not any(pair[0] is each for each, _ in shown)]
    for each, figure in shown:
        style = "bold" if each is made.best else None if each.fits else "dim"
        cost = [f"{figure.cost:,.0f}"] if with_cost and figure.cost is not None else []
        words = "as configured; " * (each.as_configured and len(pairs) > 1) + figure.reason
        table.add_row(str(each), *_figures(each, figure, made), *cost, words.rstrip("; "), style=style)
    console.print(table)
    notes = Table.grid("", "", padding=(0, 2, 0, 0))
    for word, meaning in _notes(made, pairs, len(shown)):
        notes.add_row(word, Text(meaning))
    console.print(notes)


def _figures(each: Planned, figure: Figures, made: Plan) -> list[str]:
    prediction = each.prediction
    mfu = [] if made.fleet.machine.is_cpu else [f"{prediction.mfu_pct:.1f}"]
    return [
        f"{each.memory / 2**30:,.1f}",
        f"{1e3 * prediction.step_seconds:,.0f}",
        *(f"{1e3 * prediction.split[key]:,.0f}" for key in SPLIT),
        *mfu,
        f"{figure.tokens_per_second_per_gpu:,.0f}",
        f"{figure.days:,.2f}",
    ]


def _notes(made: Plan, pairs: list[tuple[Planned, Figures]], shown: int) -> list[tuple[str, str]]:
    machine, lines = made.fleet.machine, []
    fitting = sum(each.fits for each, _ in pairs)
    if len(pairs) > 1:
        lines.append(("layouts", f"{len(pairs)} admitted, {fitting} fit; {shown} shown, --all shows every one"))
    if made.best is not None and len(pairs) > 1:
        lines.append(("to run it", "vpmoe train CONFIG " + " ".join(made.best.layout.flags())))
    for text, count in sorted(made.refused.items(), key=lambda pair: -pair[1]):
        lines.append(("refused", f"{count} times: {text}"))
    lines.append(("mb, again", "rows of a micro-batch; what the backward pass computes again"))
    if any(each.layout.given["compile"] != "off" for each, _ in pairs):
        lines.append(("layers, step", "what is compiled; of the fastest layouts alone, and what it saves is assumed"))
    lines.append(("prod, bytes", "device time bound by products, and by memory; launch: what launches add to both"))
    lines.append(("comm, wait", "communication that no work covers; stages of a pipeline that wait"))
    lines.append(
        ("taken", "rows for whole documents, every position for supervised; no sampling, teacher or validation")
    )
    by_source: dict[str, list[str]] = {}
    for kind, curve in machine.efficiency.items():
        share = "" if isinstance(curve, list) else f" {curve:g}"
        by_source.setdefault(machine.source(kind), []).append(kind + share)
    lines += [("efficiency", f"{', '.join(kinds)}: {source}") for source, kinds in by_source.items()]
    lines.append(
        ("peaks", f"{machine.source('peaks')}; a launch {machine.launch_us:g} us: {machine.source('launch_us')}")
    )
    return lines
