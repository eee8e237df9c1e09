"""A whole training step, ours against the same model of Megatron-Core's stock local parts, interleaved in one run.

    python scripts/bench/step.py                                       # the nano model: tokens/s of either side
    python scripts/bench/step.py --ours-only --config configs/vpmoe_stage1.yaml -- --num-layers 8    # on a GPU

Both sides train the same configuration on the same mock data, starting from the same weights: forward, backward,
optimizer, in one process. The stock side has upstream's linears, TopKRouter, SequentialMLP, torch RMSNorm, unfused
DotProductAttention under a mask of documents and windows (its mask function adds our distance bias), whole logits
with upstream's cross-entropy, and NorMuon in a loop over matrices. What upstream has no part for (TPA, GRAPE-M, value
residual, a shared expert with biases) is ours on both sides. Losses of the first steps are compared first.

Prints one JSON object: tokens/s and milliseconds of either side, the ratio stock / ours of each round (min, median,
max) by wall and by processor time, the optimizer's share of our step, and the router health's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.profiling.capture import Subject
from megatron_vpmoe.profiling.stopwatch import spread
from megatron_vpmoe.runtime import device, distributed

if TYPE_CHECKING:
    from stock_parts import Stock

NANO = Path(__file__).resolve().parents[2] / "configs" / "nano" / "stage1.yaml"
UPDATING = ("prepare_grads", "squared_grad_norm", "update")
LOSS_TOLERANCE = 2e-3
"""Relative difference of the losses of the first steps; upstream's balance loss is another function of the batch."""


class Timed:
    """Wraps a function and adds up the wall time of its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        device.finish()
        begin = time.perf_counter()
        result = self.function(*arguments, **keywords)
        device.finish()
        self.seconds += time.perf_counter() - begin
        return result


def shares(subject: Subject, rounds: int) -> dict[str, Any]:
    """Percent of a step in the optimizer and in router health (counting in the routers, reduction, metrics).

    Median and extremes over the rounds.
    """
    routers = [module for module in subject.model.modules() if isinstance(module, VPMoERouter)]
    found: dict[str, list[float]] = {"optimizer_pct": [], "router_health_pct": []}
    optimizer, monitor = subject.optimizer, subject.monitor
    for _ in range(rounds):
        updating = [Timed(getattr(type(optimizer), name).__get__(optimizer)) for name in UPDATING]
        for name, timed in zip(UPDATING, updating, strict=True):
            setattr(optimizer, name, timed)
        health = [Timed(type(monitor).reset.__get__(monitor)), Timed(type(monitor).metrics.__get__(monitor))]
        monitor.reset, monitor.metrics = health
        for router in routers:
            router._count = Timed(type(router)._count.__get__(router))
            health.append(router._count)
        step = Timed(subject.step)
        step()
        found["optimizer_pct"].append(100 * sum(part.seconds for part in updating) / step.seconds)
        found["router_health_pct"].append(100 * sum(part.seconds for part in health) / step.seconds)
    for name in UPDATING:
        delattr(optimizer, name)
    del monitor.reset, monitor.metrics
    for router in routers:
        del router._count
    return {name: spread(values) for name, values in found.items()}


def seconds(side: Subject | Stock) -> tuple[float, float]:
    """Wall and processor time of one step."""
    device.finish()
    wall, processor = time.perf_counter(), time.process_time()
    side.step()
    device.finish()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(ours: Subject, stock: Stock, steps: int) -> list[tuple[float, float]]:
    """Losses of both sides over the first steps; ends the run where they differ."""
    losses = []
    for _ in range(steps):
        ours.step()
        stock.step()
        losses.append((ours.loss, stock.loss))
    if any(not abs(a - b) <= LOSS_TOLERANCE * abs(b) for a, b in losses):
        raise SystemExit(f"the two sides train different models; losses (ours, stock): {losses}")
    return losses


def measure(cfg: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare, then time."""
    ours = Subject(cfg)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "tokens_per_step": cfg.training.global_batch_size * cfg.data.seq_length,
    }
    sides: list[Subject | Stock] = [ours]
    if not arguments.ours_only:
        from stock_parts import Stock

        stock = Stock(cfg, ours.model, ours.steps)
        sides.append(stock)
        result["losses_ours_stock"] = [[round(x, 5) for x in pair] for pair in compare(ours, stock, 3)]
    else:
        for _ in range(3):
            ours.step()
    rounds = [[seconds(side) for side in sides] for _ in range(arguments.rounds)]
    for name, column in zip(("ours", "stock"), zip(*rounds, strict=True), strict=False):
        wall = [w for w, _ in column]
        result[f"{name}_ms"] = spread([1e3 * w for w in wall])
        result[f"{name}_tokens_per_second"] = round(result["tokens_per_step"] / statistics.median(wall), 1)
    if not arguments.ours_only:
        result["stock_over_ours"] = spread([stock[0] / mine[0] for mine, stock in rounds])
        result["stock_over_ours_processor_time"] = spread([stock[1] / mine[1] for mine, stock in rounds])
    return {**result, **shares(ours, arguments.rounds)}


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(NANO))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--ours-only", action="store_true", help="no stock side: shares of our step alone")
    parser.add_argument("overrides", nargs="*", help="after --, fields of the configuration")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    given = " ".join(arguments.overrides)
    alone = [f"{flag}=1" for flag in ("--nproc-per-node", "--expert-model-parallel-size") if flag not in given]
    cfg = load_config(arguments.config, [*alone, *arguments.overrides], nodes=1)
    with distributed.single_process(seed=cfg.training.seed):
        print(json.dumps(measure(cfg, arguments), indent=1))


if __name__ == "__main__":
    main()
