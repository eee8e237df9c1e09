"""A training step with and without ``training.compile``, interleaved: what it saves, and when it has paid.

    python scripts/bench/compile.py --threads 1
    python scripts/bench/compile.py --case dense-50m --choices off layers

Every choice trains the same configuration from the same weights on the same mock batches. A choice's first step, in
which it compiles, is timed apart, from an empty cache of inductor's; losses of the first steps are compared. Then
rounds of one step each, in an order that rotates.

Prints one JSON object: for each choice seconds of the first step, of a step by the clock and by the process's processor
time, the ratio off / choice of each (min, median, max), and the steps after which what compiling took has been saved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from plan import CASES, CONFIGS

from megatron_vpmoe.config import load_config
from megatron_vpmoe.profiling.capture import Subject
from megatron_vpmoe.profiling.stopwatch import spread
from megatron_vpmoe.runtime import device, distributed

CLOCKS = {"clock": time.perf_counter, "processor": time.process_time}
TOLERANCE = 1e-3
"""Relative difference of the losses of the first steps; a routed token may fall to another expert by a last bit."""


def seconds(subject: Subject) -> dict[str, float]:
    """Of one step, by each clock."""
    device.finish()
    began = {name: now() for name, now in CLOCKS.items()}
    subject.step()
    device.finish()
    return {name: now() - began[name] for name, now in CLOCKS.items()}


def measure(case: str, choices: list[str], rounds: int, overrides: list[str]) -> dict[str, Any]:
    """The printed object."""
    _, name, flags = CASES[case]
    configs = {
        choice: load_config(CONFIGS / name, [*flags.split(), f"--compile={choice}", *overrides], nodes=1)
        for choice in choices
    }
    sides, first, losses = {}, {}, {}
    for choice, cfg in configs.items():
        distributed.seed_rank(cfg.training.seed)
        sides[choice] = Subject(cfg)
        first[choice] = seconds(sides[choice])
        losses[choice] = [sides[choice].loss]
    for _ in range(2):
        for choice, side in sides.items():
            side.step()
            losses[choice].append(side.loss)
    for choice in choices:
        if any(not abs(a - b) <= TOLERANCE * b for a, b in zip(losses[choice], losses[choices[0]], strict=True)):
            raise SystemExit(f"the sides train different models; losses: {losses}")
    taken: dict[str, list[dict[str, float]]] = {choice: [] for choice in choices}
    for number in range(rounds):
        turn = number % len(choices)
        for choice in choices[turn:] + choices[:turn]:
            taken[choice].append(seconds(sides[choice]))
    return {
        "case": case,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "losses": {choice: [round(loss, 6) for loss in of] for choice, of in losses.items()},
        **{choice: told(first[choice], taken[choice], taken[choices[0]]) for choice in choices},
    }


def told(
    first: dict[str, float], steps: list[dict[str, float]], without: list[dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Of one choice, by each clock."""
    found: dict[str, dict[str, Any]] = {}
    for clock in CLOCKS:
        mine, others = [step[clock] for step in steps], [step[clock] for step in without]
        saved = statistics.median(others) - statistics.median(mine)
        found[clock] = {
            "first_step_s": round(first[clock], 1),
            "step_ms": spread([1e3 * value for value in mine], 1),
            "off_over_it": spread([other / own for other, own in zip(others, mine, strict=True)]),
        }
        if steps is not without:
            found[clock]["paid_after_steps"] = round(first[clock] / saved) if saved > 0 else None
    return found


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[case for case, (ranks, *_) in CASES.items() if ranks == 1], default="nano-1")
    parser.add_argument("--choices", nargs="+", default=["off", "layers"], help="the first is what others are held to")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="after --, fields of the configuration")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as cache, distributed.single_process(seed=1):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        print(json.dumps(measure(arguments.case, arguments.choices, arguments.rounds, arguments.overrides), indent=1))


if __name__ == "__main__":
    main()
