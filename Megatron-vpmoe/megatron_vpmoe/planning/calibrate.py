"""A CPU measured: the rates that predictions need, by small probes, in under a minute.

With one thread, times are the processor's, so that other work on the machine disturbs little. With more, and between
two processes, who waits for whom is part of them: there it is the clock's least time, right on a machine that is idle.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.runtime import device
from megatron_vpmoe.runtime.machines import Curve, Machine

_SIDES = (4, 16, 32, 64, 128, 256, 512, 1024)
_ROWS = 2048
_EXPERTS, _TOPK = 16, 4
_RING = 2**24  # numbers of tensors that a probe goes through
_SMALL = 2**18
_HEADS = (32, 64, 128)
_MOVED = (2**16, 2**18, 2**20, 2**22, 2**24)  # numbers of a tensor
_SECONDS = 0.04  # of one round of a probe
_ROUNDS = 7
_SHARED = 2**22  # numbers that two processes add up
_MEASURED = "measured by vpmoe plan --calibrate"


def measure(tell: Callable[[str], object], threads: Sequence[int] | None = None) -> list[Machine]:
    """This CPU with one thread, and with as many as it has cores.

    Args:
        tell: is told what is being measured.
        threads: instead of those two.

    Raises:
        DeviceError: this is a GPU machine, or two processes could not speak to each other.
    """
    if device.has_gpu():
        raise DeviceError("this machine has a GPU", source="--calibrate", remedy="GPUs are in runtime/machines.toml")
    device.prepare()
    device.keep_memory()
    torch.set_flush_denormal(True)
    before = torch.get_num_threads()
    tell("what two processes do side by side, and send each other")
    together = _together()
    found: list[Machine] = []
    alone: dict[tuple[str, int], float] = {}
    try:
        for count in threads or sorted({1, len(os.sched_getaffinity(0))}):
            tell(f"products, attention and memory with {count} thread{'s' * (count > 1)}")
            torch.set_num_threads(count)
            # On a busy machine threads wait for each other; more of them are never taken for slower than one.
            rates = {name: max(rate, alone.get(name, 0.0)) for name, rate in _rates(_probes()).items()}
            alone = rates if count == 1 else alone
            found.append(_machine(count, rates, together))
    finally:
        torch.set_num_threads(before)
    return found


class _Probe(NamedTuple):
    """Something to run, and how many units (FLOP, bytes, operations) one call of it is."""

    run: Callable[[], object]
    units: float


def _probes() -> dict[tuple[str, int], _Probe]:
    """By kind and size."""
    probes = {("product", side): _product(side, torch.float32) for side in _SIDES}
    probes |= {("small", side): _batch(side) for side in _SIDES if side <= 512}
    probes |= {("experts", side): _experts(side) for side in _SIDES if 16 <= side <= 256}
    probes |= {("attention", dim): _attention(dim) for dim in _HEADS}
    probes |= {("memory", 4 * count): _moving(count) for count in _MOVED}
    return probes | {("narrow", 1024): _product(1024, torch.bfloat16), ("overhead", 1): _overhead()}


def _machine(threads: int, found: dict[tuple[str, int], float], together: dict[str, float]) -> Machine:
    import psutil

    rates: dict[str, dict[int, float]] = {}
    for (kind, size), rate in found.items():
        rates.setdefault(kind, {})[size] = rate
    link = together["link"]
    kept = [together[name[0]] / found[name] for name in (("product", 128), ("memory", 2**20))]
    peak, bandwidth = max(rates["product"].values()), max(rates["memory"].values())

    def curve(kind: str, top: float) -> Curve:
        return [(float(size), rate / top) for size, rate in sorted(rates[kind].items())]

    return Machine(
        name="CPU",
        bf16_tflops=rates["narrow"][1024] / 1e12,
        fp32_tflops=peak / 1e12,
        memory_gib=psutil.virtual_memory().total / 2**30,
        memory_gb_s=bandwidth / 1e9,
        link_gb_s=link / 1e9,
        network_gb_s=link / 1e9,
        node_gpus=1024,
        usable=1.0,
        kernel_us=1e6 / rates["overhead"][1],
        launch_us=0.0,
        beside=min(1.0, statistics.mean(kept)) if threads == 1 else 1.0,
        efficiency={
            "product": curve("product", peak),
            "wide": curve("product", peak),
            "experts": curve("experts", peak),
            "small": curve("small", peak),
            "attention": curve("attention", peak),
            "memory": curve("memory", bandwidth),
            "link": 1.0,
            "network": 1.0,
        },
        sources={"peaks": _MEASURED},
        threads=threads,
    )


def _rates(probes: dict[tuple[str, int], _Probe]) -> dict[tuple[str, int], float]:
    """Units a second of each; rounds go through all of them, so that a burst of other work meets one round of each."""
    alone = torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def taken(run: Callable[[], object], calls: int) -> float:
        began = clock()
        for _ in range(calls):
            run()
        return clock() - began

    calls = {}
    for name, probe in probes.items():
        taken(probe.run, 1)
        calls[name] = max(1, int(_SECONDS / max(taken(probe.run, 1), 1e-7)))
    rounds = [{name: taken(probe.run, calls[name]) for name, probe in probes.items()} for _ in range(_ROUNDS)]
    typical = statistics.median if alone else min
    return {
        name: probe.units * calls[name] / typical([of_round[name] for of_round in rounds])
        for name, probe in probes.items()
    }


def _ring(*shape: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Tensors of a shape in turn, more of them than caches hold: a step comes back to none of its own soon."""
    return itertools.cycle([torch.randn(*shape, dtype=dtype) for _ in range(max(2, _RING // math.prod(shape)))])


def _product(side: int, dtype: torch.dtype) -> _Probe:
    """FLOP of a product with a matrix [side, side], and of that matrix's gradient."""
    rows, right = _ring(_ROWS, side, dtype=dtype), torch.randn(side, side, dtype=dtype)

    def both() -> None:
        left = next(rows)
        _ = left @ right, left.t() @ next(rows)

    return _Probe(both, 2 * 2 * _ROWS * side * side)


def _batch(side: int) -> _Probe:
    """FLOP of a batch of [side, side] x [side, 2 side], as stacks of matrices and products of a token have."""
    count = max(4, _SMALL // side**2)
    left, right = _ring(count, side, side), _ring(count, side, 2 * side)
    return _Probe(lambda: next(left) @ next(right), 2 * count * 2 * side**3)


def _experts(side: int) -> _Probe:
    """FLOP of experts of inner width ``side``, as this machine lays out their rows."""
    from megatron_vpmoe.model.moe.expert_rows import layout_of

    hidden, chosen = 4 * side, torch.rand(_ROWS, _EXPERTS).topk(_TOPK).indices
    layout, weight = layout_of(chosen, _EXPERTS, torch.float32), torch.randn(_EXPERTS, side, hidden)
    rows = [layout.gather(torch.randn(_ROWS, hidden)) for _ in range(4)]
    made, ring = layout.linear(rows[0], weight, None), itertools.cycle(rows)

    def three() -> None:
        left = next(ring)
        _ = layout.linear(left, weight, None), layout.linear_transposed(made, weight), layout.outer(made, left)

    return _Probe(three, 3 * 2 * _ROWS * _TOPK * side * hidden)


def _attention(dim: int) -> _Probe:
    """FLOP of torch's fused kernel forward and backward: whole rows, and tiles of a window, as much of each."""
    from megatron_vpmoe.model.attention.backends.sdpa import fused_backward, fused_forward

    runs, units = [], 0.0
    for batch, heads, queries, keys, causal in ((4, 4, 384, 384, True), (288, 2, 64, 64, False)):
        long, short = _ring(batch, heads, queries, dim), _ring(batch, heads, keys, dim)
        bias = torch.zeros(batch, 1, queries, keys)

        def both(long: Any = long, short: Any = short, bias: Tensor = bias, causal: bool = causal) -> None:
            q, k, v = next(long), next(short), next(short)
            out, lse = fused_forward(q, k, v, bias, 1.0, causal=causal)
            fused_backward(next(long), q, k, v, out, lse, bias, 1.0, causal=causal)

        runs.append(both)
        units += 3.5 * 2 * 2 * batch * heads * queries * ((keys + 1) / 2 if causal else keys) * dim
    return _Probe(lambda: [run() for run in runs], units)


def _moving(count: int) -> _Probe:
    """Bytes of steps between products: a product by element, a sum, a mean over rows, a copy to another order."""
    ring = _ring(count // 128, 128)

    def steps() -> None:
        x, y = next(ring), next(ring)
        _ = x * y, next(ring) + next(ring), next(ring).square().mean(-1)
        _ = next(ring).unflatten(1, (4, 32)).mT.contiguous()

    return _Probe(steps, 4 * count * (3 + 3 + 3 + 2))


def _overhead() -> _Probe:
    """Operations on next to no numbers, with as many views around them as a layer has, autograd included."""
    x, chain = torch.ones(2, 4, requires_grad=True), 64

    def both() -> None:
        y = x.flatten()
        for _ in range(chain):
            y = (y.unflatten(0, (2, 4)).transpose(0, 1).unsqueeze(0).squeeze(0).t() * x).flatten()
        y.sum().backward()

    return _Probe(both, 4 * chain)  # two products and a sum of gradients backward


def _of_both() -> dict[tuple[str, int], _Probe]:
    """Probes of a process alone and of two together."""
    return {("product", 128): _product(128, torch.float32), ("memory", 2**20): _moving(2**18)}


def _together() -> dict[str, float]:
    """What two processes with one thread each find at the same time: rates of probes, and ``link``, in bytes/s."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, str(Path(folder) / "store")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for rank in range(2)
        ]
        told = [process.communicate(timeout=120) for process in ranks]
    if any(process.returncode for process in ranks):
        raise DeviceError(
            f"two processes could not speak to each other: {told[0][1].decode(errors='replace')[-300:]}",
            source="gloo",
            remedy="GLOO_SOCKET_IFNAME names the network interface",
        )
    return json.loads(told[0][0])


def main(store: str, rank: str) -> None:
    """One of the two: prints what it finds."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    device.keep_memory()
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2, timeout=timeout)
    numbers, taken = torch.ones(_SHARED), []
    for _ in range(12):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        taken.append(time.perf_counter() - began)
    probes = _of_both()
    dist.barrier()
    found = {kind: rate for (kind, _), rate in _rates(probes).items()}
    dist.barrier()
    print(json.dumps({**found, "link": 4 * _SHARED / statistics.median(taken)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
