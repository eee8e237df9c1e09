"""The optimizer's step: NorMuon on stacks against one matrix at a time, and a whole model's step against its floor.

    python scripts/bench/optimizer.py                                       # 4 layers of 256 experts of 1024 x 128
    python scripts/bench/optimizer.py --layers 7 --experts 16 --hidden 128 --ffn 32 --rounds 9      # nano's experts
    python scripts/bench/optimizer.py --model configs/vpmoe_stage1.yaml                      # 100 GiB: on a GPU
    python scripts/bench/optimizer.py --model configs/vpmoe_stage1.yaml --num-layers 8       # as many as fit
    python scripts/bench/optimizer.py --model configs/nano/stage1.yaml

Prints one JSON object. Sides are interleaved in one run; times are the fastest of the rounds, ratios min, median and
max over them. The first form compares the two sides' results before it times them, measures the machine's matmul rate
in between, and counts operator calls with the profiler, also for stacks of the size that a GPU gets. Operations are
counted as they are done: the stacks iterate on the Gram matrix and need fewer than the loop, which follows the
published formula. ``equivalent`` is the rate at which the published formula's operations would have been done.

The second form runs ``VpOptimizer.step`` of the whole model (norm, clipping, NorMuon, AdamW, bf16 copies) on random
gradients. Its floor is the larger of the bytes it cannot avoid over the measured copy bandwidth, and of its operations
over the measured matmul rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_vpmoe.config.memory import STACK_BYTES
from megatron_vpmoe.optim.normuon import NorMuon
from megatron_vpmoe.optim.polar_express import COEFFICIENTS, choose_iteration, compute_dtype, polar_express_flops

BETA, BETA2, EPS, LR, DECAY = 0.95, 0.95, 1e-10, 1e-3, 0.1
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


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
    """Time of one call: wall time on a GPU, idle before and after; on a CPU the process's own, deaf to other work."""
    if not torch.cuda.is_available():
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def operator_calls(run: Callable[[], object]) -> int:
    """Operator calls of one step, nested ones included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def matmul(device: str) -> tuple[Callable[[], object], int]:
    """A square product in the dtype Polar Express computes in, and its operations."""
    size, dtype = MATMUL_SIZE[device], compute_dtype(device)
    square = torch.randn(size, size, device=device).to(dtype)
    return lambda: square @ square, 2 * size**3


def spread(ratios: list[float]) -> dict[str, float]:
    """Min, median and max, rounded."""
    return {
        "min": round(min(ratios), 2), "median": round(statistics.median(ratios), 2), "max": round(max(ratios), 2)
    }  # fmt: skip


def slice_against_loop(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """The stacks' step and the loop's, on the experts of a few layers."""
    params = expert_parameters(arguments, device)
    loop_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for ours, theirs in zip(params, loop_params, strict=True):
        theirs.grad = ours.grad
    stacked, loop = NorMuon(params, LR, DECAY), LoopNorMuon(loop_params)
    stacked.step()
    loop.step()
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(params, loop_params, strict=True))
    product, product_flops = matmul(device)
    product()
    rounds = [tuple(map(seconds, (product, stacked.step, product, loop.step))) for _ in range(arguments.rounds)]
    matmul_s = min(min(before, after) for before, _, after, _ in rounds)
    stacked_s, loop_s = min(row[1] for row in rounds), min(row[3] for row in rounds)
    matrices, shape = 2 * arguments.layers * arguments.experts, (arguments.ffn, arguments.hidden)
    form = choose_iteration(*shape, compute_dtype(device))
    done, published = (matrices * polar_express_flops(*shape, iteration=f) for f in (form, "direct"))
    peak = product_flops / matmul_s
    stacked_calls, loop_calls = operator_calls(stacked.step), operator_calls(loop.step)
    gpu_stacks = NorMuon(params, LR, DECAY, stack_bytes=STACK_BYTES["cuda"])
    gpu_stacks.state = stacked.state
    gpu_calls = operator_calls(gpu_stacks.step)
    return {
        "matrices": matrices,
        "shape": shape,
        "iteration": form,
        "largest_weight_difference": difference,
        "stacked_ms": round(stacked_s * 1e3, 2),
        "loop_ms": round(loop_s * 1e3, 2),
        "loop_over_stacked": spread([row[3] / row[1] for row in rounds]),
        "gigaflop_done": round(done / 1e9, 2),
        "gigaflop_published": round(published / 1e9, 2),
        "matmul_gflops": round(peak / 1e9, 1),
        "stacked_share_of_matmul": round(done / stacked_s / peak, 3),
        "stacked_share_by_round": spread([done / row[1] * min(row[0], row[2]) / product_flops for row in rounds]),
        "equivalent_share_of_matmul": round(published / stacked_s / peak, 3),
        "stacked_calls": stacked_calls,
        "loop_calls": loop_calls,
        "loop_calls_over_stacked": round(loop_calls / stacked_calls, 1),
        "gpu_stack_mib": STACK_BYTES["cuda"] // 2**20,
        "gpu_stacks_calls": gpu_calls,
        "loop_calls_over_gpu_stacks": round(loop_calls / gpu_calls, 1),
    }


def model_against_floor(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """The whole optimizer of a configuration on random gradients, in one process."""
    from megatron_vpmoe.config import load_config
    from megatron_vpmoe.runtime.distributed import single_process

    flags = [] if arguments.num_layers is None else ["--num-layers", str(arguments.num_layers)]
    cfg = load_config(arguments.model, flags)
    with single_process(seed=0):
        from megatron_vpmoe.model.builder import build_model
        from megatron_vpmoe.optim import assignment_table, build_optimizer
        from megatron_vpmoe.optim.matrix_layout import layout_flops, matrix_layout

        model = build_model(cfg)
        optimizer = build_optimizer([model], cfg)
        for param in model.parameters():
            param.main_grad = torch.randn(param.shape, device=param.device)  # type: ignore[attr-defined]
        optimizer.step()
        product, product_flops = matmul(device)
        source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        sides = (product, lambda: target.copy_(source), optimizer.step)
        rounds = [tuple(map(seconds, sides)) for _ in range(arguments.rounds)]
        rows = assignment_table(model, cfg)
    matmul_s, copy_s, step_s = (min(column) for column in zip(*rounds, strict=True))
    elements = {kind: sum(torch.Size(r.shape).numel() for r in rows if r.optimizer == kind) for kind in KINDS}
    # Gradient, state and weight are read, state and weight written, all fp32; in bf16 the model's copy is written too.
    copied = 2 if cfg.training.bf16 else 0
    bytes_moved = elements["normuon"] * (5 * 4 + copied) + elements["adamw"] * (7 * 4 + copied)
    dtype = compute_dtype(device)
    routed = [param for param, row in zip(model.parameters(), rows, strict=True) if row.matrices]
    flops = sum(layout_flops(matrix_layout(param), param.shape, dtype) for param in routed)
    memory_s, compute_s = bytes_moved / (2 * COPY_BYTES[device] / copy_s), flops / (product_flops / matmul_s)
    return {
        "config": str(arguments.model),
        "layers": cfg.model.num_layers,
        "elements": elements,
        "matrices": sum(row.matrices for row in rows),
        "teraflop": round(flops / 1e12, 3),
        "gigabytes": round(bytes_moved / 1e9, 2),
        "matmul_tflops": round(product_flops / matmul_s / 1e12, 3),
        "copy_gb_per_s": round(2 * COPY_BYTES[device] / copy_s / 1e9, 1),
        "step_ms": round(step_s * 1e3, 2),
        "floor_compute_ms": round(compute_s * 1e3, 2),
        "floor_memory_ms": round(memory_s * 1e3, 2),
        "step_over_floor": spread([row[2] / max(memory_s, compute_s) for row in rounds]),
        "calls": operator_calls(optimizer.step),
    }


KINDS = ("normuon", "adamw")


def main() -> None:
    """Parse the arguments and run one of the two forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 4, "experts": 256, "hidden": 1024, "ffn": 128, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--model", help="configuration whose whole optimizer is timed")
    parser.add_argument("--num-layers", type=int, help="with --model: so many of its layers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measure = model_against_floor if arguments.model else slice_against_loop
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({"device": name, **measure(arguments, device)}, indent=1))


if __name__ == "__main__":
    main()
