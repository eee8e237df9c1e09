"""Runs on a terminal: the list, one run, several beside each other. Texts of others are shown, never obeyed."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vpmoe.errors import visible
from megatron_vpmoe.files import read_json_lines
from vpmoe.runs.comparison import config_differences, origin_differences, overlay
from vpmoe.runs.database import damaged_lines
from vpmoe.runs.queries import last_values, series
from vpmoe.runs.registry import RunEntry, checkpoints_of, labels

_COLOURS = {
    "running": "bold green",
    "finished": "green",
    "stopped": "yellow",
    "failed": "bold red",
    "killed": "red",
    "unknown": "dim",
}
_SHOWN_ID = 8
_PIPED_COLUMNS = 160
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_COLUMNS = 40
_SAMPLES = 3
_LONGEST_SAMPLE = 200
_PLAIN = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0), "title_justify": "left"}


def console() -> Console:
    """For stdout: as wide as the terminal; wide in a pipe, unless COLUMNS says otherwise."""
    plain = Console()
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Console(width=_PIPED_COLUMNS)


def show_list(runs: Sequence[RunEntry], console: Console) -> None:
    """One row a run; an experiment that all belong to stands above."""
    experiments = {run.experiment for run in runs}
    title = Text(f"experiment {visible(experiments.pop())}") if len(experiments) == 1 else None
    with_tags = any(run.tags for run in runs)
    table = Table(**_PLAIN, title=title)
    for head in ("id", "name", "status", "step", "started", "took", "loss", "valid", "tok/s"):
        right = head not in ("id", "name", "status", "started")
        table.add_column(head, justify="right" if right else "left", no_wrap=head != "name", overflow="fold")
    for head in [*([] if title else ["experiment"]), *(["tags"] if with_tags else [])]:
        table.add_column(head, overflow="fold")
    for run in runs:
        last = run.config.get("training", {}).get("train_iters", "?")
        rate = run.results.get("throughput/tokens_per_second")
        more = [*([] if title else [run.experiment]), *([" ".join(run.tags)] if with_tags else [])]
        table.add_row(
            *(_text(run.id[:_SHOWN_ID]), Text(visible(run.name), "" if run.is_there else "dim")),
            *(
                Text(run.status, _COLOURS.get(run.status, "")),
                _text(f"{run.step}/{last}"),
                _at(run.started)[5:],
                _took(run),
            ),
            *(number(run.results.get("loss/total")), number(validation_loss(run)), number(rate)),
            *(_text(cell) for cell in more),
        )
    console.print(table)


def show_run(run: RunEntry, console: Console, *, config: bool = False) -> None:
    """Everything that is known of a run; ``config``: with the whole configuration."""
    git, data = run.provenance.get("git") or {}, run.provenance.get("dataset_manifest_sha256")
    hardware = run.provenance.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    facts = {
        "id": run.id,
        "experiment": run.experiment,
        "status": run.status + (f": {run.error}" if run.error else ""),
        "directory": str(run.directory) + ("" if run.is_there else "  (it is not there)"),
        "step": f"{run.step} of {run.config.get('training', {}).get('train_iters', '?')}",
        "started": f"{_at(run.started)}, took {_took(run)}",
        "process": f"{run.pid} on {run.host}, {run.world_size} in all" if run.host else "",
        "hardware": f"{len(gpus)} x {gpus[0]}"
        if gpus
        else f"{hardware.get('cpu', '')}, {hardware.get('cores', '?')} cores"
        if hardware
        else "",
        "code": f"{git.get('sha') or 'unknown'}{' with changes' if git.get('dirty') else ''}",
        "config": str(run.provenance.get("config_hash") or ""),
        "dataset": ", ".join(data) if isinstance(data, list) else str(data or ""),
        "tags": " ".join(run.tags),
        "note": run.note,
    }
    console.print(Text(visible(run.name), "bold"), Text(run.status, _COLOURS.get(run.status, "")))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts.items():
        if value:
            grid.add_row(Text(name, "dim"), _text(value))
    console.print(grid)
    if len(run.segments) > 1:
        console.print(_segments(run))
    values = last_values(run) if run.metrics.is_file() else run.results
    console.print(_values(run, values))
    if damaged := damaged_lines(run):
        console.print(Text(f"{damaged} lines of {run.metrics} are no records and were left out", "red"))
    _show_files(run, console)
    if config:
        for section, fields in run.config.items():
            console.print(_text(f"{section}:"))
            for name, value in fields.items():
                console.print(_text(f"  {name}: {value}"))


def _segments(run: RunEntry) -> Table:
    table = Table(title="starts", **_PLAIN)
    for head in ("from step", "to step", "status", "started", "processes", "host"):
        table.add_column(head)
    for number_, each in enumerate(run.segments):
        status = run.status if number_ == len(run.segments) - 1 else each["status"]
        row = each["first_step"], each["last_step"], status, _at(each["started"]), each["world_size"], each["host"]
        table.add_row(*(_text(str(cell)) for cell in row))
    return table


def _values(run: RunEntry, values: dict[str, float]) -> Table:
    table = Table(title="metrics", **_PLAIN)
    for head, justify in (("tag", "left"), ("last", "right"), ("over the run", "left")):
        table.add_column(head, justify=justify)  # pyright: ignore[reportArgumentType]
    shown = [tag for tag in values if "/layer_" not in tag]
    curves = series([run], shown, points=2 * _CURVE_COLUMNS) if run.metrics.is_file() else None
    drawn = {} if curves is None else {tag: list(of["value"]) for tag, of in curves.groupby("tag")}
    for tag in shown:
        table.add_row(_text(tag), number(values[tag]), sparkline(drawn.get(tag, ())))
    return table


def _show_files(run: RunEntry, console: Console) -> None:
    if saved := checkpoints_of(run.directory):
        names = ", ".join(path.name for path in saved[:8]) + (f" and {len(saved) - 8} more" if len(saved) > 8 else "")
        console.print(Text("checkpoints", "dim"), _text(names))
    path = run.directory / "samples.jsonl"
    if path.is_file():
        last = deque((sample for _, sample in read_json_lines(path) if isinstance(sample, dict)), _SAMPLES)
        for sample in last:
            told = "".join(str(sample.get(name, "")) for name in ("prompt", "completion"))
            console.print(Text(f"sample of step {sample.get('step')}", "dim"), _text(told[-_LONGEST_SAMPLE:]))


def show_comparison(runs: Sequence[RunEntry], tags: Sequence[str], console: Console, *, by: str, points: int) -> None:
    """Curves at common points, results, and where configurations and origins differ."""
    names = labels(runs)
    frame = overlay(runs, tags, by=by, points=points)
    for tag in tags:
        table = Table(title=Text(visible(f"{tag} by {by}")), **_PLAIN)
        for head in (by, *names):
            table.add_column(_text(head), justify="right")
        for x, of_point in frame[frame["tag"] == tag].groupby("x"):
            found = dict(zip(of_point["run"], of_point["value"], strict=True))
            table.add_row(f"{x:,.0f}" if by != "time" else f"{x:,.1f}", *(number(found.get(run.id)) for run in runs))
        console.print(table if table.row_count else _text(f"{tag}: no {by} that all of them have reached"))
    results = [run.results for run in runs]
    shared = [tag for tag in results[0] if all(tag in other for other in results)]
    _print_rows("last values", names, [(tag, [number(each[tag]) for each in results]) for tag in shared], console)
    told = [(key, [_short(value) for value in values]) for key, values in config_differences(runs)]
    _print_rows("configurations differ in", names, told, console)
    told = [(key, [_short(value) for value in values]) for key, values in origin_differences(runs)]
    _print_rows("origins differ in", names, told, console)


def _print_rows(title: str, names: Sequence[str], rows: Sequence[tuple[str, list[str]]], console: Console) -> None:
    if not rows:
        console.print(_text(f"{title}: nothing"))
        return
    table = Table(title=title, **_PLAIN)
    for head in ("", *names):
        table.add_column(_text(head), overflow="fold")
    for key, values in rows:
        table.add_row(_text(key), *(_text(value) for value in values))
    console.print(table)


def show_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]], console: Console) -> None:
    """The answer to a query."""
    table = Table(**_PLAIN)
    for head in columns:
        table.add_column(_text(head), overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else _text(str(cell)) for cell in row))
    console.print(table)


def sparkline(values: Sequence[float], columns: int = _CURVE_COLUMNS) -> str:
    """Values as bars between the lowest and the highest; of a stretch its last stands; "·" where it is no number."""
    shown = list(values)
    if len(shown) > columns:
        shown = [shown[(number + 1) * len(shown) // columns - 1] for number in range(columns)]
    finite = [value for value in shown if value - value == 0]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join("·" if value - value != 0 else _BARS[int((value - low) * scale)] for value in shown)


def validation_loss(run: RunEntry) -> float | None:
    """The last validation loss; of a blend, of its first dataset."""
    tags = [tag for tag in run.results if tag.startswith("valid") and tag.endswith("loss/total")]
    return run.results[tags[0]] if tags else None


def number(value: float | None) -> str:
    """Four digits, or whole where it is large; nothing for none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1e4 and value - value == 0 else f"{value:.4g}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(text: str) -> Text:
    return Text(visible(text))


def _at(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _took(run: RunEntry) -> str:
    end = run.ended or (time.time() if run.status == "running" else None)
    if end is None:
        return ""
    whole = max(0, round(end - run.started))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
