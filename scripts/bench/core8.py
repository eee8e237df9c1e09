"""CORE items scored as the suite does, against one option at a time: the same items, and the ratio of the times.

The items are made up: ten examples of about forty tokens before a question with four options. One at a time is a whole
forward pass an option, `ref/core_scoring.py`'s way without its fp64. Each round times both, in turns which is first.

    python scripts/bench/core8.py

The model is configs/nano/stage1.yaml, or with --dense the Qwen3 shape of configs/nano/qwen3_o200k.yaml; untrained.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch

from megatron_vpmoe.config import load_config
from megatron_vpmoe.model.attention.masks import left_padded
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.runtime import distributed
from vpmoe.eval.suites.likelihoods import Request, likelihoods

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "nano"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    chosen = parser.parse_args()
    cfg = load_config(CONFIGS / ("qwen3_o200k.yaml" if chosen.dense else "stage1.yaml"), [])
    draw = random.Random(1)
    requests = []
    for _ in range(chosen.items):
        before = tuple(draw.choices(range(300), k=draw.randint(380, 480)))
        options = [tuple(draw.choices(range(300), k=draw.randint(1, 12))) for _ in range(4)]
        requests += [Request(before, option, len(option)) for option in options]
    with distributed.single_process(seed=1), torch.no_grad():
        model = build_model(cfg).eval()

        def alone() -> list[float]:
            found = []
            for one in requests:
                whole = [*one.context, *one.given]
                ids, layout = left_padded([whole], model.device)
                scored = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
                scored[:, len(one.context) - 1 : -1] = True
                found.append(float(model(ids, layout).log_probabilities(ids.roll(-1, 1), scored)[0].sum()))
            return found

        def together() -> list[float]:
            return [one.log_p for one in likelihoods(model, requests, rows=chosen.rows)]

        ratios = []
        for number in range(chosen.rounds):
            seconds, values = {}, {}
            for way in (alone, together) if number % 2 else (together, alone):
                began = time.perf_counter(), time.process_time()
                values[way] = way()
                seconds[way] = time.perf_counter() - began[0], time.process_time() - began[1]
            apart = max(abs(one - other) for one, other in zip(values[alone], values[together], strict=True))
            wall, cpu = (seconds[alone][clock] / seconds[together][clock] for clock in (0, 1))
            ratios.append((wall, cpu))
            rate = {way.__name__: chosen.items / spent[0] for way, spent in seconds.items()}
            print(f"round {number}: items/s {rate}, ratio wall {wall:.2f} cpu {cpu:.2f}, apart {apart:.1e}", flush=True)
        print("median ratio: wall {:.2f}, cpu {:.2f}".format(*map(statistics.median, zip(*ratios, strict=True))))


if __name__ == "__main__":
    main()
