"""``scripts/crash_matrix.sh``: kill runs in every phase and at random moments, and see that nothing is lost."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import tests.preloaded  # noqa: F401  # before anything imports megatron.core
from tests.crash.matrix import Cell, cells, run_matrix
from tests.workers import start_fork_server

_LEGEND = """
A run of a tiny vpMoE with experts is killed (SIGKILL) at an instant, goes on (--resume) to its end, and is held against
the same run without a kill: after the kill the newest checkpoint is complete and bit for bit the straight run's, as are
the metrics up to it; in the end all of both is equal. No process is left, and nothing of the user's has gone.
"""


def main() -> int:
    """The exit code: 0 if all went well."""
    parser = argparse.ArgumentParser("scripts/crash_matrix.sh", description=__doc__, epilog=_LEGEND)
    parser.add_argument("--rounds", type=int, default=0, metavar="N", help="kills at random moments besides (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random moments (0)")
    parser.add_argument("--only", default="", metavar="TEXT", help="phases whose name has this in it; all")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="of the runs; both")
    parser.add_argument("--list", action="store_true", help="show what would be done")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where runs lie; a temporary folder")
    given = parser.parse_args()
    chosen = [
        cell
        for cell in cells(rounds=given.rounds, seed=given.seed)
        if given.only in cell.name and given.processes in (None, cell.processes)
    ]
    if given.list or not chosen:
        print(*(f"{cell.name}: {cell.processes}, {cell.who}" for cell in chosen), f"{len(chosen)} kills", sep="\n")
        return 0 if chosen else 2
    folder = given.folder or Path(tempfile.mkdtemp(prefix="vpmoe-crash-"))
    start_fork_server()
    outcomes: dict[str, dict[tuple[int, str], list[str]]] = defaultdict(lambda: defaultdict(list))

    def tell(cell: Cell, outcome: str, seconds: float, place: Path) -> None:
        outcomes[cell.name][cell.processes, cell.who].append("ok" if outcome == "ok" else "FAILED")
        done = sum(len(each) for row in outcomes.values() for each in row.values())
        drawn = "" if cell.phase else f" (seed {cell.seed})"
        head = f"[{done}/{len(chosen)}] {cell.name}{drawn}, {cell.processes} process(es), {cell.who}: {seconds:.1f} s"
        print(head, "ok" if outcome == "ok" else f"FAILED\n{outcome}\n    kept: {place}", flush=True)

    began = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):  # of runs, which a failure's message has
        good = run_matrix(chosen, folder, tell)
    print(f"\n{_table(outcomes)}\n\n{len(chosen)} kills in {time.monotonic() - began:.0f} s", end="")
    print("" if good else f"; what failed lies in {folder}")
    if good and given.folder is None:
        shutil.rmtree(folder)
    return 0 if good else 1


def _table(outcomes: dict[str, dict[tuple[int, str], list[str]]]) -> str:
    columns = [(1, "all"), (2, "all"), (2, "rank 0"), (2, "rank 1")]
    head = ["phase", "1 process", *(f"2 processes, {who}" for _, who in columns[1:])]
    rows = [
        [name, *(_counted(row[column]) if column in row else "-" for column in columns)]
        for name, row in outcomes.items()
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


def _counted(each: list[str]) -> str:
    failed = each.count("FAILED")
    return f"{failed} of {len(each)} FAILED" if failed else "ok" if len(each) == 1 else f"{len(each)} ok"


if __name__ == "__main__":
    raise SystemExit(main())
