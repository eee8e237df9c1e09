"""The quickstart's result: one report, held against the targets, and a summary for a person."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.config import config_hash, parameter_count
from megatron_vpmoe.errors import visible
from megatron_vpmoe.files import move_into_place
from megatron_vpmoe.software import provenance
from vpmoe.eval.plots import read_curves
from vpmoe.eval.reports import check_reportable, read_report, write_report
from vpmoe.eval.suites.suite_report import ALL
from vpmoe.eval.suites.suite_report import KIND as EVALUATION_KIND
from vpmoe.quickstart.plan import Plan
from vpmoe.quickstart.settings import Targets
from vpmoe.steps import read_receipt

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = 3
KIND = "quickstart"
THROUGHPUT_TAG = "throughput/tokens_per_second"


def write_quickstart_report(plan: Plan, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Write ``report.json`` and ``report.png`` to the plan's report folder; returns the report.

    Args:
        plan: all of whose steps are done.
        seconds: spent on what was made, by name.
    """
    evaluated = plan.work / plan.evaluation
    evaluation = read_report(evaluated, EVALUATION_KIND)
    splits = read_receipt(plan.work / plan.dataset)["report"]["splits"]
    count = parameter_count(plan.cfg)
    report = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "run_name": plan.cfg.training.run_name,
        "config": plan.settings.training.config,
        "overrides": list(plan.overrides),
        "settings": plan.settings.model_dump(),
        "provenance": provenance(config_hash=config_hash(plan.cfg), **data_of(evaluation)),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "model": {
            "parameters": count.total,
            "active": count.active,
            "active_without_embeddings": count.active_without_embeddings,
        },
        "data": splits,
        "training": training_summary(read_curves(plan.work / plan.run / "metrics.jsonl"), seconds["training"]),
        "targets": held_against(plan.settings.targets, evaluation["tasks"]),
        "evaluation": evaluation,
    }
    check_reportable(plan.report_folder / "report.json", KIND)
    plan.report_folder.mkdir(parents=True, exist_ok=True)
    partial = plan.report_folder / ".report.png.tmp"
    shutil.copyfile(evaluated.with_suffix(".png"), partial)
    move_into_place(partial, plan.report_folder / "report.png")
    write_report(plan.report_folder / "report.json", report)
    return report


def data_of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Vocabulary and dataset that an evaluated run was trained with, as ``software.provenance`` takes them."""
    told = evaluation["provenance"]
    return {"tokenizer": told["tokenizer"], "dataset": told["dataset_manifest_sha256"]}


def training_summary(curves: Mapping[str, list[tuple[int, float]]], seconds: float) -> dict[str, Any]:
    """Steps, seconds, the median throughput in real tokens a second, and the last value of the main curves."""
    throughput = [value for _, value in curves.get(THROUGHPUT_TAG, [])]
    shown = ("loss/analysis", "loss/final", "valid/loss/analysis", "valid/loss/final", "moe/router_agg/mean_cv_pct")
    return {
        "iterations": max((points[-1][0] for points in curves.values()), default=0),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(median(throughput), 1) if throughput else None,
        "last": {tag: curves[tag][-1][1] for tag in shown if curves.get(tag)},
    }


def held_against(targets: Targets, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Each target with what was measured, and whether all are met."""
    measured = {
        "validity": (targets.validity, tasks[ALL]["validity"]),
        "accuracy": (targets.accuracy, tasks[ALL]["accuracy"]),
    }
    measured |= {
        f"accuracy of {name}": (targets.family_accuracy, entry["accuracy"])
        for name, entry in tasks.items()
        if name != ALL
    }
    return held(measured)


def held(
    least: Mapping[str, tuple[float, float]], most: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, Any]:
    """Targets with what was measured, and whether all are met.

    Args:
        least: by name, a target and what was measured, which is not to be below it.
        most: the same of what is not to be above its target.
    """
    entries = {name: {"target": t, "measured": value, "met": value >= t} for name, (t, value) in least.items()}
    entries |= {
        name: {"target": t, "measured": value, "met": value <= t, "at_most": True}
        for name, (t, value) in (most or {}).items()
    }
    return {"met": all(entry["met"] for entry in entries.values()), "entries": entries}


def missed_line(targets: Mapping[str, Any]) -> str:
    """What was missed, in one line; a target above 1 is no share."""
    missed = []
    for name, entry in targets["entries"].items():
        if not entry["met"]:
            scale, unit, digits = (1, "", 2) if entry["target"] > 1 else (100, " %", 1)
            bound = "at most" if entry.get("at_most") else "at least"
            measured, target = scale * entry["measured"], scale * entry["target"]
            missed.append(f"{name} is {measured:.{digits}f}{unit}, {bound} {target:g}{unit} is the target")
    return "; ".join(missed)


def print_summary(report: Mapping[str, Any], folder: Path, shown_samples: int, console: Console) -> None:
    """The final table, some decoded generations, and where the report lies."""
    console.print()
    console.print(_table(report))
    for sample in report["evaluation"]["samples"][:shown_samples]:
        _print_sample(sample, console)
    console.print(
        f"\nreport: {folder / 'report.json'}, picture: {folder / 'report.png'}", highlight=False, soft_wrap=True
    )


def _table(report: Mapping[str, Any]) -> Any:
    from rich.table import Table

    tasks, training = report["evaluation"]["tasks"], report["training"]
    table = Table(title=f"vpMoE quickstart: {report['run_name']}", show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column(justify="right")
    model = report["model"]
    table.add_row("parameters, active", f"{model['parameters']:,}, {model['active']:,}")
    table.add_row("training tokens in the set", f"{report['data']['train']['tokens']:,}")
    table.add_row("steps", f"{training['iterations']:,}")
    speed = training["tokens_per_second"]
    table.add_row("tokens/s (median)", "not logged" if speed is None else f"{speed:,.0f}")
    table.add_row(
        "seconds of training, of everything", f"{training['seconds']:,.0f}, {sum(report['seconds'].values()):,.0f}"
    )
    for name, value in report["evaluation"]["losses"].items():
        table.add_row(f"valid {name}", f"{value:.4f}")
    table.add_section()
    table.add_row("valid Harmony", _share(tasks[ALL]["valid"], tasks[ALL]["n"]))
    for family, entry in tasks.items():
        if family != ALL:
            table.add_row(f"exact, {family}", _share(entry["exact"], entry["n"]))
    return table


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} % ({count} of {total})"


def _print_sample(sample: Mapping[str, Any], console: Console) -> None:
    verdict = "exact" if sample["exact"] else "valid, not exact" if sample["valid"] else f"not valid: {sample['fault']}"
    # The texts are the model's: nothing in them is markup.
    console.print(visible(f"\n{sample['family']}: {sample['query']}"), style="bold", markup=False, highlight=False)
    console.print(visible(sample["completion"]), markup=False, highlight=False, soft_wrap=True)
    console.print(f"-> {verdict}, expected {sample['expected']}", style="dim", markup=False, highlight=False)
