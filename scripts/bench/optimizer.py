"""NorMuon on stacks against the same step one matrix at a time, interleaved in one run.

    python scripts/bench/optimizer.py                                       # the experts of the nano model
    python scripts/bench/optimizer.py --layers 1 --experts 64 --hidden 1024 --ffn 128

Prints one JSON object: milliseconds a step of either side (fastest of the rounds), the ratio loop / stacked of each
round (min, median, max), the share of the machine's matmul rate that the stacked step reaches, measured in between, and
operator calls counted by the profiler. Both sides do the same arithmetic; their results are compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from megatron_vpmoe.optim.normuon import NorMuon
from megatron_vpmoe.optim.polar_express import COEFFICIENTS, polar_express_flops

BETA, BETA2, EPS, LR, DECAY = 0.95, 0.95, 1e-10, 1e-3, 0.1
MATMUL_SIZE = 1024


class LoopNorMuon:
    """The formulas written down for one matrix, in a Python loop over matrices: what stacking replaces."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.matrices = [(param, expert) for param in params for expert in range(param.shape[0])]
        self.momenta = [torch.zeros_like(param[expert]) for param, expert in self.matrices]
        self.statistics = [param.new_zeros(param.shape[1], 1) for param, _ in self.matrices]

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix in turn."""
        for index, (param, expert) in enumerate(self.matrices):
            assert param.grad is not None
            weight, grad = param[expert], param.grad[expert]
            if not grad.any():
                continue
            momentum = self.momenta[index].lerp_(grad, 1 - BETA)
            update = _polar_express(torch.lerp(grad, momentum, BETA))
            norm = update.norm()
            statistic = self.statistics[index].lerp_(update.square().mean(1, keepdim=True), 1 - BETA2)
            update = update / (statistic + EPS).sqrt()
            update *= norm / update.norm() * max(1.0, update.shape[0] / update.shape[1]) ** 0.5
            weight.mul_(1 - LR * DECAY).sub_(update, alpha=LR)


def _polar_express(x: torch.Tensor) -> torch.Tensor:
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = (x / (x.norm() * 1.02 + 1e-6)).to(torch.bfloat16 if x.is_cuda else torch.float32)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def expert_parameters(arguments: argparse.Namespace, device: str) -> list[torch.nn.Parameter]:
    """fc1 [E, F, H] and fc2 [E, H, F] of each layer, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(arguments.ffn, arguments.hidden), (arguments.hidden, arguments.ffn)] * arguments.layers
    params = []
    for rows, cols in shapes:
        param = torch.nn.Parameter(torch.randn(arguments.experts, rows, cols, generator=generator).to(device))
        param.grad = torch.randn(param.shape, generator=generator).to(device)
        params.append(param)
    return params


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, with the device idle before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def operator_calls(run: Callable[[], object]) -> int:
    """Operator calls of one step, nested ones included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def main() -> None:
    """Parse the arguments, compare the results, time both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"layers": 7, "experts": 16, "hidden": 128, "ffn": 32, "rounds": 7, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stacked_params, loop_params = expert_parameters(arguments, device), expert_parameters(arguments, device)
    stacked, loop = NorMuon(stacked_params, LR, DECAY), LoopNorMuon(loop_params)
    stacked.step()
    loop.step()
    difference = max(float((a - b).abs().max()) for a, b in zip(stacked_params, loop_params, strict=True))

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    square = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype)
    sides = (stacked.step, loop.step, lambda: square @ square)
    rounds = [tuple(seconds(side) for side in sides) for _ in range(arguments.rounds)]
    stacked_s, loop_s, matmul_s = (min(column) for column in zip(*rounds, strict=True))
    ratios = [b / a for a, b, _ in rounds]
    matrices = 2 * arguments.layers * arguments.experts
    flops = matrices * polar_express_flops(arguments.ffn, arguments.hidden)
    peak = 2 * MATMUL_SIZE**3 / matmul_s
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "matrices": matrices,
        "shape": [arguments.ffn, arguments.hidden],
        "largest_weight_difference": difference,
        "stacked_ms": round(stacked_s * 1e3, 3),
        "loop_ms": round(loop_s * 1e3, 3),
        "loop_over_stacked": {
            "min": round(min(ratios), 2),
            "median": round(statistics.median(ratios), 2),
            "max": round(max(ratios), 2),
        },
        "matmul_gflops": round(peak / 1e9, 1),
        "stacked_share_of_matmul": round(flops / stacked_s / peak, 3),
        "stacked_calls": operator_calls(stacked.step),
        "loop_calls": operator_calls(loop.step),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
