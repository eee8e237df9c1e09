"""What opening a run costs: a store with a run of many records, listed, asked for its last values, its curves, a query.

Each figure is the median of some rounds, imports apart: by the clock, and of the processor, all threads together. The
file is read anew each time. A further run is written to meanwhile, step by step, as a trainer does.

    python scripts/bench/runs.py                        # 100,000 records
    python scripts/bench/runs.py --records 1000000 --runs 10
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.metrics import JsonlSink, Record, RunStoreSink
from vpmoe.runs.comparison import overlay
from vpmoe.runs.database import ask
from vpmoe.runs.queries import last_values, series, tags_of
from vpmoe.runs.registry import list_runs

REPOSITORY = Path(__file__).resolve().parents[2]
TAGS = 40


def step_records(step: int) -> list[Record]:
    """What a step of a run with ``TAGS`` metrics leaves."""
    place = [Record(step, "elapsed/tokens", 2048.0 * step), Record(step, "elapsed/seconds", 0.5 * step)]
    return place + [Record(step, f"metric/{tag}", math.sin(step * (tag + 1)) / 3) for tag in range(TAGS - 2)]


def write(cfg: RunConfig, directory: Path, records: int) -> None:
    """A finished run of so many records."""
    log = JsonlSink(directory / "metrics.jsonl")
    store = RunStoreSink(cfg, directory, provenance={}, step=0, world_size=1)
    for step in range(1, records // TAGS + 1):
        log.write(of_step := step_records(step))
        store.write(of_step)
    log.close()
    store.close()


def grow(path: Path, stop: threading.Event) -> None:
    """Write to a run until told."""
    log, step = JsonlSink(path), 0
    while not stop.is_set():
        log.write(step_records(step := step + 1))
        time.sleep(0.01)
    log.close()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "registry.sqlite"
        flags = [f"--run-store={store}", "--train-iters=1000000"]
        cfg = load_config(REPOSITORY / "configs" / "nano" / "stage1.yaml", flags)
        for number in range(given.runs):
            write(cfg, Path(folder) / f"run{number}", given.records)
        runs = list_runs(store)
        size = sum(run.metrics.stat().st_size for run in runs) / 2**20
        print(f"{given.runs} runs of {given.records:,} records, {size:.1f} MiB")
        stop = threading.Event()
        beside = threading.Thread(target=grow, args=(Path(folder) / "growing" / "metrics.jsonl", stop))
        beside.start()
        curves = [f"metric/{tag}" for tag in range(4)]
        measures: dict[str, Callable[[], object]] = {
            "list": lambda: list_runs(store),
            "tags": lambda: tags_of(runs),
            "last values": lambda: last_values(runs[0]),
            "4 curves by tokens": lambda: series(runs, curves, by="tokens"),
            "compared by time": lambda: overlay(runs, curves, by="time"),
            "SQL": lambda: ask("SELECT run, tag, avg(value) FROM metrics GROUP BY ALL", store),
            "opened: list, tags, 4 curves": lambda: (list_runs(store), tags_of(runs), series(runs, curves)),
        }
        try:
            for name, measure in measures.items():
                measure()
                times = []
                for _ in range(given.rounds):
                    began, worked = time.perf_counter(), time.process_time()
                    measure()
                    times.append((time.perf_counter() - began, time.process_time() - worked))
                clock, processor = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
                print(f"  {name:30} {clock:6.0f} ms, {processor:6.0f} ms of the processor")
        finally:
            stop.set()
            beside.join()


if __name__ == "__main__":
    main()
