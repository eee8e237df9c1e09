"""What this card reaches, measured once, beside what its maker states."""

from __future__ import annotations

import functools

import torch

from megatron_vpmoe.profiling.stopwatch import Rates, measured_rates
from megatron_vpmoe.runtime import device


@functools.cache
def rates_of_card(dry: bool) -> Rates:
    """Of bf16 products and copies."""
    small = {"size": 256, "copied": 2**22, "rounds": 2}
    return measured_rates(torch.bfloat16, **(small if dry else {}))


def stated_rates() -> Rates | None:
    """Of the table of peaks; None for a device that is not in it."""
    flops, bandwidth = device.peak_flops(bf16=True), device.peak_bandwidth()
    return None if flops is None or bandwidth is None else Rates(flops, bandwidth)
