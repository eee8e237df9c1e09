"""Prediction against measurement on this CPU: the machine is measured before and after each case, in one run.

    python scripts/bench/plan.py
    python scripts/bench/plan.py --case nano-1 --steps 9

Cases: the nano step with one process and with two, and a dense model of 50 M parameters; each process has one thread.
Seconds are those of the processor (the busiest process), which other work on the machine disturbs less than the
clock's; both are printed, with the ratio of the measured median to the prediction, the mean of those of both machines.
It is `vpmoe plan`'s, with the share of positions that the mock batches supervise.
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


def steps(case: str, count: int) -> None:
    """One process of a case: prints the seconds of ``count`` steps after two that warm up, and the supervised share."""
    from megatron_vpmoe.runtime import device, distributed

    device.prepare()
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.optim import build_optimizer
    from megatron_vpmoe.profiling.mock import mock_step
    from megatron_vpmoe.training.step import train_step

    torch.set_num_threads(1)
    cfg = config(case)
    distributed.initialize(seed=cfg.training.seed)
    wrapped = wrap_for_training(build_model(cfg), cfg)
    optimizer, objective = build_optimizer([wrapped], cfg), build_objective(cfg)
    found: dict[str, Any] = {"processor": [], "clock": []}
    for number in range(count + 2):
        batches = mock_step(cfg, step=number, dp_rank=distributed.rank(), dp_size=distributed.world_size())
        began = time.process_time(), time.perf_counter()
        train_step(wrapped, optimizer, objective, batches)
        if number >= 2:
            found["processor"].append(time.process_time() - began[0])
            found["clock"].append(time.perf_counter() - began[1])
        found["supervised"] = float(torch.cat([(batch.loss_mask > 0).float() for batch in batches]).mean())
    print(json.dumps(found))
    distributed.shutdown()


def measured(case: str, count: int) -> dict[str, Any]:
    """Medians over steps, of the process that takes longest."""
    processes = CASES[case][0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(processes):
        world = {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(world if processes > 1 else {})}
        command = [sys.executable, __file__, "--worker", case, "--steps", str(count)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    told = [json.loads(process.communicate(timeout=900)[0].splitlines()[-1]) for process in ranks]
    longest = {key: max(statistics.median(each[key]) for each in told) for key in ("processor", "clock")}
    return {**longest, "supervised": told[0]["supervised"]}


def main() -> None:
    """Measure the machine, then every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="default: all")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        steps(arguments.worker, arguments.steps)
        return
    print(f"load {os.getloadavg()[0]:.1f}", flush=True)
    (after,) = measure(lambda doing: None, [1])
    for case in arguments.case or CASES:
        before, cfg, found = after, config(case), measured(case, arguments.steps)
        (after,) = measure(lambda doing: None, [1])
        both = [
            predict(cfg, Fleet(machine=machine, gpus=CASES[case][0]), supervised=found["supervised"])
            for machine in (before, after)
        ]
        seconds = statistics.mean(each.step_seconds for each in both)
        split = {key: statistics.mean(each.split[key] for each in both) for key in both[0].split}
        parts = ", ".join(f"{key} {1e3 * value:.0f}" for key, value in split.items() if value)
        rates = " and ".join(f"{1e3 * each.fp32_tflops:.0f}" for each in (before, after))
        print(
            f"{case} ({parameter_count(cfg).total / 1e6:.1f} M): predicted {1e3 * seconds:.0f} ms "
            f"({parts}; {rates} GFLOP/s before and after), "
            f"measured {1e3 * found['processor']:.0f} ms of the processor, {1e3 * found['clock']:.0f} of the clock: "
            f"{found['processor'] / seconds:.2f} times as long",
            flush=True,
        )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
