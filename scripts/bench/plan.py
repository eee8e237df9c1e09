"""Prediction against measurement on this CPU, in rounds: the machine is measured, steps run, it is measured again.

    python scripts/bench/plan.py
    python scripts/bench/plan.py --case nano-1 --rounds 5

Cases: the nano step with one process and with two, and a dense model of 50 M parameters; each process has one thread.
Seconds are those of the processor (the busiest process), which other work on the machine disturbs less than the
clock's; both are printed. A round's ratio is its median step over the mean of the two predictions around it, so that a
machine whose speed drifts is compared with itself; told is the median of rounds, and the least and the largest. The
prediction is `vpmoe plan`'s, with the share of positions that the mock batches supervise.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_vpmoe.config import RunConfig, load_config, parameter_count
from megatron_vpmoe.planning.calibrate import measure
from megatron_vpmoe.planning.predict import predict
from megatron_vpmoe.runtime.machines import Fleet

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "nano"
DENSE = (
    "--hidden-size=512 --num-layers=12 --ffn-hidden-size=1536 --num-attention-heads=8 --num-query-groups=4 "
    "--kv-channels=64 --padded-vocab-size=24576 --micro-batch-size=2 --global-batch-size=2 --nproc-per-node=1"
)
CASES = {
    "nano-1": (1, "stage1.yaml", "--nproc-per-node=1"),
    "nano-2": (2, "stage1.yaml", "--nproc-per-node=2"),
    "dense-50m": (1, "qwen3.yaml", DENSE),
}


def config(case: str) -> RunConfig:
    """The case's run."""
    _, name, flags = CASES[case]
    return load_config(CONFIGS / name, flags.split(), nodes=1)


def serve(case: str) -> None:
    """One process of a case: for each line, a number of steps, tells their seconds and the supervised share."""
    from megatron_vpmoe.runtime import device, distributed

    device.prepare()
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.optim import build_optimizer
    from megatron_vpmoe.profiling.mock import mock_step
    from megatron_vpmoe.training.step import train_step

    torch.set_num_threads(1)
    cfg, number = config(case), 0
    distributed.initialize(seed=cfg.training.seed)
    wrapped = wrap_for_training(build_model(cfg), cfg)
    optimizer, objective = build_optimizer([wrapped], cfg), build_objective(cfg)
    for line in sys.stdin:
        found: dict[str, Any] = {"processor": [], "clock": []}
        for _ in range(int(line)):
            batches = mock_step(cfg, step=number, dp_rank=distributed.rank(), dp_size=distributed.world_size())
            began = time.process_time(), time.perf_counter()
            train_step(wrapped, optimizer, objective, batches)
            found["processor"].append(time.process_time() - began[0])
            found["clock"].append(time.perf_counter() - began[1])
            found["supervised"] = float(torch.cat([(batch.loss_mask > 0).float() for batch in batches]).mean())
            number += 1
        print(json.dumps(found), flush=True)
    distributed.shutdown()


def start(case: str) -> list[subprocess.Popen[str]]:
    """The processes of a case."""
    processes, ranks = CASES[case][0], []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in range(processes):
        world = {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(world if processes > 1 else {})}
        command = [sys.executable, __file__, "--worker", case]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe))
    return ranks


def run(ranks: list[subprocess.Popen[str]], count: int) -> dict[str, float]:
    """Medians over ``count`` steps, of the process that takes longest."""
    for process in ranks:
        assert process.stdin is not None
        print(count, file=process.stdin, flush=True)
    told = []
    for process in ranks:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("{"):
            if not line:
                raise RuntimeError("a process of the case has ended")
        told.append(json.loads(line))
    longest = {key: max(statistics.median(each[key]) for each in told) for key in ("processor", "clock")}
    return {**longest, "supervised": told[0]["supervised"]}


def compare(case: str, rounds: int, count: int) -> None:
    """Print a line for each round and one for all."""
    cfg, ranks, ratios = config(case), start(case), []
    run(ranks, 2)
    (after,) = measure(lambda doing: None, [1])
    for _ in range(rounds):
        before, found = after, run(ranks, count)
        (after,) = measure(lambda doing: None, [1])
        both = [
            predict(cfg, Fleet(machine=machine, gpus=len(ranks)), supervised=found["supervised"])
            for machine in (before, after)
        ]
        seconds = statistics.mean(each.step_seconds for each in both)
        ratios.append(found["processor"] / seconds)
        split = {key: statistics.mean(each.split[key] for each in both) for key in both[0].split}
        parts = ", ".join(f"{key} {1e3 * value:.0f}" for key, value in split.items() if value)
        rates = " and ".join(f"{1e3 * each.fp32_tflops:.0f}" for each in (before, after))
        measured = f"{1e3 * found['processor']:.0f} ms of the processor, {1e3 * found['clock']:.0f} of the clock"
        print(f"  predicted {1e3 * seconds:.0f} ms ({parts}; {rates} GFLOP/s before and after)", flush=True)
        print(f"  measured {measured}: {ratios[-1]:.2f}", flush=True)
    for process in ranks:
        process.communicate(timeout=60)
    told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    size = f"{parameter_count(cfg).total / 1e6:.1f} M"
    print(f"{case}, {size}: measured over predicted {told}, load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    """Every case that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker)
        return
    for case in arguments.case or CASES:
        compare(case, arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
