"""Runs of the nano model whose experts' products are in a narrow format, emulated, against runs in bf16.

    python scripts/bench/narrow_experts.py                              # 200 steps of each, a process each
    python scripts/bench/narrow_experts.py --steps 60 --seeds 1 2

The same data in the same order. For each seed of the weights there is a run in bf16 and one in each format; what counts
is how far a format ends from bf16 of its seed, beside how far bf16 ends from itself with another one. The validation
loss is that of the plain weights. Prints each curve of it, then one JSON object: by format the final loss less that of
bf16 (nats; min, median, max over seeds), its largest distance at any validation, and the processor time of a run over
that of bf16, which says what emulation costs, and nothing of a card. Ends with an error where a format leaves the band.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from beside import dataset

from megatron_vpmoe.config import expert_formats
from megatron_vpmoe.metrics import read_records
from megatron_vpmoe.profiling.stopwatch import spread

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "configs" / "nano" / "stage1.yaml"
BAND = 0.03
"""Nats of the validation loss after the last step: what a format may be apart from bf16 of its seed."""


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1])
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
    plain = [curves["null", seed][last] for seed in asked.seeds]
    result: dict[str, object] = {"steps": asked.steps, "seeds": asked.seeds, "load": round(os.getloadavg()[0], 1)}
    result["bf16 ends at"] = spread(plain, 4)
    worst = 0.0
    for name in expert_formats.FORMATS:
        apart = [
            {step: loss - curves["null", seed][step] for step, loss in curves[name, seed].items()}
            for seed in asked.seeds
        ]
        worst = max(worst, *(abs(each[last]) for each in apart))
        result[name] = {
            "final loss less bf16's": spread([each[last] for each in apart], 4),
            "farthest at any validation": round(max(abs(distance) for each in apart for distance in each.values()), 4),
            "processor time over bf16's": spread([a / b for a, b in zip(seconds[name], seconds["null"], strict=True)]),
        }
    print(json.dumps(result))
    if worst > BAND:
        raise SystemExit(f"a format ends {worst:.3f} nats from bf16, further than {BAND}")


if __name__ == "__main__":
    main()
