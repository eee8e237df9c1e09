"""Runs of the nano model whose experts' products are in a narrow format, emulated, against runs in bf16.

    python scripts/bench/narrow_experts.py                              # 200 steps of each, a process each
    python scripts/bench/narrow_experts.py --steps 60 --seeds 1 2

The same data in the same order. For each seed of the weights there is a run in bf16 and one in each format; what counts
is the distance of a format from bf16 of its seed, beside that of bf16 from itself between seeds. Prints each curve of
the validation loss, then one JSON object: by format the final loss over that of bf16 (min, median, max over seeds) and
its largest distance at any validation from half of the steps on; the processor time of a step over that of bf16 says
what emulation costs, and nothing of a card. Ends with an error where a format leaves the band.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_vpmoe.config import expert_formats
from megatron_vpmoe.metrics import read_records
from megatron_vpmoe.profiling.stopwatch import spread
from scripts.bench.beside import dataset

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "configs" / "nano" / "stage1.yaml"
BAND = 0.03
"""Of the validation loss, relative to bf16's; two seeds in bf16 lie as far apart (docs/LOG.md)."""


def curve(folder: Path, data: Path, precision: str, seed: int, steps: int) -> tuple[dict[int, float], float]:
    """Step -> validation loss of one run, and its processor seconds."""
    flags = {
        "bf16": "true",
        "experts-precision": precision,
        "seed": seed,
        "train-iters": steps,
        "eval-interval": max(1, steps // 8),
        "eval-iters": 8,
        "nproc-per-node": 1,
        "data-path": data,
        "run-dir": folder,
        "save-interval": "null",
        "sample-interval": "null",
        "wandb-mode": "disabled",
        "router-dead-experts-warn": "null",
        "router-max-load-warn-pct": "null",
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "megatron_vpmoe.pretrain", str(NANO), *words],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'Megatron-vpmoe'}:{ROOT}"},
        stdout=(folder.parent / f"{folder.name}.log").open("w"),
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = [record for record in read_records(folder / "metrics.jsonl") if record.tag == "valid/loss/total"]
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {record.step: record.value for record in told}, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    asked = parser.parse_args()
    names = ["null", *expert_formats.FORMATS]
    curves: dict[tuple[str, int], dict[int, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        data = dataset(Path(scratch), questions=80 * asked.steps)  # four a row of 384, sixteen rows a step: each once
        for seed in asked.seeds:
            for name in names:
                found, spent = curve(Path(scratch) / f"{name}_{seed}", data, name, seed, asked.steps)
                curves[name, seed] = found
                seconds[name].append(spent)
                shown = "  ".join(f"{step}: {loss:.4f}" for step, loss in found.items())
                print(f"{'bf16' if name == 'null' else name}, seed {seed}: {shown}", flush=True)
    last = max(curves["null", asked.seeds[0]])
    plain = {seed: curves["null", seed][last] for seed in asked.seeds}
    middle = statistics.median(plain.values())
    result: dict[str, object] = {"steps": asked.steps, "seeds": asked.seeds, "load": round(os.getloadavg()[0], 1)}
    result["bf16 over its median seed"] = spread([loss / middle for loss in plain.values()])
    worst = 0.0
    for name in expert_formats.FORMATS:
        ratios = {
            step: [curves[name, seed][step] / curves["null", seed][step] for seed in asked.seeds]
            for step in curves["null", asked.seeds[0]]
            if step >= asked.steps // 2
        }
        farthest = max(abs(ratio - 1) for each in ratios.values() for ratio in each)
        worst = max(worst, *(abs(ratio - 1) for ratio in ratios[last]))
        cost = [narrow / wide for narrow, wide in zip(seconds[name], seconds["null"], strict=True)]
        result[name] = {
            "final loss over bf16": spread(ratios[last]),
            "farthest from bf16": round(farthest, 4),
            "processor time over bf16": spread(cost),
        }
    print(json.dumps(result))
    if worst > BAND:
        raise SystemExit(f"a format ends {worst:.1%} from bf16, further than {BAND:.0%}")


if __name__ == "__main__":
    main()
