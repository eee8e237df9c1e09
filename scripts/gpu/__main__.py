"""The check of a GPU machine: right numbers first, then speeds. At most eight minutes; nothing is downloaded.

    scripts/gpu_check.sh                         # on one GPU; writes reports/perf/gpu_<card>.json and .md
    scripts/gpu_check.sh --only step --only resume
    scripts/gpu_check.sh --list
    scripts/gpu_check.sh --dry-run               # the same code on a CPU at small sizes; writes artifacts/gpu_check/

Exit codes: 0, all comparisons with the CPU hold; 1, one does not, or its section died; 2, it cannot run here. Every
section runs, whatever became of those before it; one that runs over its time or out of memory is reported.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_vpmoe.errors import ConfigError, DeviceError, VpmoeError
from megatron_vpmoe.profiling.__main__ import hardware
from megatron_vpmoe.runtime import device, distributed
from scripts.gpu import report
from scripts.gpu.cpu_side import ROOT, CpuSide
from scripts.gpu.frame import Findings, perform
from scripts.gpu.rates import rates_of_card
from scripts.gpu.sections import SECTIONS

LONGEST_S = 480
REPLACED = (
    "dry run on a CPU: sdpa in the place of flex, banded by its CPU kernel, no flash; small sizes and configurations; "
    "times say nothing of a GPU"
)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="SECTION", help="this section; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the sections and their budgets")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the report")
    parser.add_argument("--overwrite", action="store_true", help="replace the report of an earlier check")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at small sizes")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Run the sections and write the report; returns the exit code."""
    asked = arguments(given)
    if asked.list:
        for section in SECTIONS:
            print(f"{section.name:16s} {section.budget_s:3d} s  {section.title}")
        return 0
    try:
        return check(asked)
    except VpmoeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def check(asked: argparse.Namespace) -> int:
    """Every section asked for.

    Raises:
        DeviceError: there is no GPU, or a dry run has one.
        ConfigError: a section that is none.
        NotOursError, DataError: of the report's place.
    """
    begin = time.monotonic()
    names = [section.name for section in SECTIONS]
    if wrong := [name for name in asked.only or [] if name not in names]:
        raise ConfigError(f"there is no section {wrong[0]!r}", source="--only", remedy=", ".join(names))
    if not asked.dry_run and not device.has_gpu():
        raise DeviceError(
            "this machine has no GPU that torch can use",
            source="torch.cuda.is_available()",
            remedy="run it where there is one, with a CUDA build of torch; --dry-run runs the same code on a CPU",
        )
    if asked.dry_run and device.has_gpu():
        remedy = "leave it out, or hide the GPU: CUDA_VISIBLE_DEVICES= scripts/gpu_check.sh --dry-run"
        raise DeviceError("a dry run is of a CPU, and here is a GPU", source="--dry-run", remedy=remedy)
    folder = asked.output or ROOT / ("artifacts/gpu_check" if asked.dry_run else "reports/perf")
    again = asked.overwrite or (asked.dry_run and asked.output is None)
    path = report.place(folder, dry=asked.dry_run, overwrite=again)
    profiles = ROOT / "artifacts" / "profiles" / datetime.date.today().isoformat() / hardware() / "torch"
    traces = (folder if asked.dry_run else profiles) / "gpu_check"
    chosen = [section for section in SECTIONS if asked.only is None or section.name in asked.only]
    if asked.dry_run:
        print(REPLACED)
    else:  # no alarm reaches a process that waits for a kernel without end
        faulthandler.dump_traceback_later(LONGEST_S, exit=True)
    entries: list[dict[str, Any]] = []
    compared = [section.name for section in chosen if section.numbers is not None]
    with (
        tempfile.TemporaryDirectory() as scratch,
        distributed.single_process(seed=1),
        closing(CpuSide(Path(scratch), compared, dry=asked.dry_run)) as cpu,
    ):
        rates = rates_of_card(asked.dry_run)
        print(f"bf16 product {rates.flops / 1e12:.3g} TFLOP/s, copy {rates.bandwidth / 1e12:.3g} TB/s")
        for number, section in enumerate(chosen, start=1):
            print(f"\n[{number}/{len(chosen)}] {section.name}: {section.title} ({section.budget_s} s)", flush=True)
            if not section.decides:
                cpu.close()
            entries.append(perform(section, Findings(_say, asked.dry_run, cpu, traces)))
            _say(f"{entries[-1]['status']} after {entries[-1]['seconds']} s")
            left = [each.name for each in chosen[number:]]
            report.write(path, entries, left, dry=asked.dry_run, seconds=time.monotonic() - begin)
    faulthandler.cancel_dump_traceback_later()
    failed = [entry["name"] for entry in entries if not report.passed([entry])]
    print(f"\n{'FAILED: ' + ', '.join(failed) if failed else 'all comparisons hold'}; {path} and .md")
    return 1 if failed else 0


def _say(line: str) -> None:
    print("  " + line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
