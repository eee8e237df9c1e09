"""What the check leaves behind: one JSON and the same as tables beside it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vpmoe.files import write_atomically
from megatron_vpmoe.profiling.__main__ import hardware
from megatron_vpmoe.runtime import device
from megatron_vpmoe.software import provenance
from scripts.gpu.frame import shown
from scripts.gpu.rates import rates_of_card, stated_rates
from vpmoe.errors import DataError
from vpmoe.eval.reports import check_reportable, markdown_table, write_report

KIND, SCHEMA_VERSION = "gpu_check", 2


def place(folder: Path, *, dry: bool, overwrite: bool) -> Path:
    """Where the report of this card goes.

    Raises:
        NotOursError: something else lies there.
        DataError: a report does, and ``overwrite`` does not allow for it.
    """
    path = folder / f"gpu_{'dry-run' if dry else hardware()}.json"
    check_reportable(path, KIND)
    if path.exists() and not overwrite:
        raise DataError(
            "here lies a finished report", source=str(path), remedy="--overwrite replaces it, --output names a folder"
        )
    return path


def write(path: Path, sections: Sequence[dict[str, Any]], left: Sequence[str], *, dry: bool, seconds: float) -> None:
    """The JSON, and the tables beside it; after each section, so that what cuts the check short loses nothing.

    Args:
        path: of the JSON.
        sections: what has been done.
        left: names of sections that are still to come.
        dry: sizes are small, on the CPU.
        seconds: since the start.
    """
    report = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "dry_run": dry,
        "date": datetime.date.today().isoformat(),
        "device": _device(dry),
        "provenance": provenance(),
        "load_average": round(os.getloadavg()[0], 1),
        "seconds": round(seconds, 1),
        "left": list(left),
        "passed": not left and passed(sections),
        "sections": list(sections),
    }
    write_report(path, report)  # the JSON comes first: where it is, the tables are its
    write_atomically(path.with_suffix(".md"), (markdown(report) + "\n").encode())


def passed(sections: Sequence[dict[str, Any]]) -> bool:
    """Whether every section that decides has passed, or had nothing here to compare."""
    return all(section["status"] in ("passed", "skipped") for section in sections if section["decides"])


def _device(dry: bool) -> dict[str, Any]:
    about: dict[str, Any] = {"name": device.device_name(), "cuda": torch.version.cuda}
    if device.has_gpu():
        properties = torch.cuda.get_device_properties(device.current_device())
        about["memory_gib"] = round(properties.total_memory / 2**30, 1)
        about["capability"] = f"{properties.major}.{properties.minor}"
    for name, rates in (("measured", rates_of_card(dry)), ("stated", stated_rates())):
        if rates is not None:
            about[name] = {
                "bf16_product_tflops": round(rates.flops / 1e12, 3),
                "copy_tb_per_s": round(rates.bandwidth / 1e12, 4),
            }
    return about


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    about = report["device"]
    title = "Dry run on the CPU: numbers of small sizes, no speeds" if report["dry_run"] else about["name"]
    measured, stated = (about.get(name) for name in ("measured", "stated"))
    lines = [
        f"# {title}",
        "",
        f"{report['date']}, torch {report['provenance']['packages']['torch']}, {report['seconds']} s in all.",
    ]
    for name, rates in (("Measured", measured), ("Stated", stated)):
        if rates:
            lines.append(
                f"{name}: bf16 product {rates['bf16_product_tflops']} TFLOP/s, memory {rates['copy_tb_per_s']} TB/s."
            )
    if report["left"]:
        lines.append(f"Cut short: {', '.join(report['left'])} did not end.")
    cells = [
        [each["name"], each["status"], f"{each['seconds']} of {each['budget_s']}", each["title"], each["died"] or ""]
        for each in report["sections"]
    ]
    lines += ["", markdown_table(["section", "", "s", "what", "died of"], cells)]
    for each in report["sections"]:
        lines += ["", f"## {each['name']}", ""]
        if each["checks"]:
            rows = [
                [
                    check["name"],
                    "not a number" if check["error"] is None else f"{check['error']:.2e}",
                    f"{check['limit']:g}",
                    "" if check["passed"] else "FAILED",
                ]
                for check in each["checks"]
            ]
            lines += [markdown_table(["check", "error", "limit", ""], rows), ""]
        if each["rows"]:
            names = list(each["rows"][0])
            lines += [markdown_table(names, [[shown(row[name]) for name in names] for row in each["rows"]]), ""]
        lines += [f"- {note}" for note in each["notes"]]
    return "\n".join(lines).rstrip()
