"""What measurements share: seconds of a call, sides in turns, what the device reaches at best, peaks of memory."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vpmoe.runtime import device
from megatron_vpmoe.runtime.memory import process_status

Side = Callable[[], object]


def seconds(run: Side, calls: int = 1) -> float:
    """Wall time of one call, the device idle before the first and after the last of ``calls``."""
    device.finish()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    device.finish()
    return (time.perf_counter() - begin) / calls


def in_turns(sides: Mapping[str, Side], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of each side in each round; every round runs all of them, in an order that rotates.

    A machine that slows down slows all sides. A round before the first one warms up.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(-1, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            spent = seconds(sides[name], calls)
            if number >= 0:
                taken[name].append(spent)
    return taken


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Min, median and max."""
    return {name: round(f(values), digits) for name, f in (("min", min), ("median", statistics.median), ("max", max))}


@dataclass(frozen=True)
class Rates:
    """What this device reaches: FLOP/s of a large square product, byte/s (read and written) of a large copy."""

    flops: float
    bandwidth: float

    def floor(self, flops: float, moved: float) -> float:
        """Seconds that so many operations and bytes take at least, one beside the other."""
        return max(flops / self.flops, moved / self.bandwidth)


def measured_rates(dtype: torch.dtype, *, size: int = 8192, copied: int = 2**30, rounds: int = 20) -> Rates:
    """Best of the rounds, which are back to back.

    Args:
        dtype: of the product.
        size: rows and columns of its matrices.
        copied: bytes of the copy.
        rounds: of either.
    """
    where = device.current_device()
    square = torch.randn(size, size, device=where).to(dtype)
    out = torch.empty_like(square)
    source = torch.empty(copied, device=where, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(seconds(lambda: torch.mm(square, square, out=out)) for _ in range(rounds))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(rounds))
    return Rates(2 * size**3 / product, 2 * copied / copy)


class PeakMemory:
    """Peak memory of a stretch of code over what was there before; starts at construction.

    Of the allocator on a GPU. On the CPU it is the resident set: memory that the C library keeps after it was freed is
    handed back first, so that it counts again when it is used again, and the kernel is told to start its peak anew.
    """

    def __init__(self) -> None:
        self._on_gpu = device.has_gpu()
        if self._on_gpu:
            device.finish()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._start = process_status("VmRSS")

    def over_start(self) -> int:
        """Bytes."""
        return (torch.cuda.max_memory_allocated() if self._on_gpu else process_status("VmHWM")) - self._start
