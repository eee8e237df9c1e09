"""Sides are timed in turns, floors are the larger of two times, peaks are of what a stretch of code takes."""

from __future__ import annotations

import pytest
import torch

from megatron_vpmoe.profiling.stopwatch import PeakMemory, Rates, in_turns, measured_rates, spread
from megatron_vpmoe.runtime import device


def test_every_round_runs_every_side_and_another_one_begins() -> None:
    told: list[str] = []
    taken = in_turns({name: lambda name=name: told.append(name) for name in "abc"}, rounds=3, calls=2)
    assert {name: len(times) for name, times in taken.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(told[at : at + 6]) for at in range(0, len(told), 6)]
    assert rounds == ["ccaabb", "aabbcc", "bbccaa", "ccaabb"]  # the first one warms up


def test_floor_and_spread() -> None:
    rates = Rates(flops=100.0, bandwidth=10.0)
    assert rates.floor(200.0, 10.0) == 2.0 and rates.floor(100.0, 30.0) == 3.0
    assert spread([3.0, 1.0004, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}
    small = measured_rates(torch.float32, size=64, copied=2**16, rounds=2)
    assert small.flops > 0 and small.bandwidth > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a process's resident set")
def test_peak_is_of_the_stretch() -> None:
    peak = PeakMemory()
    del_me = torch.ones(2**24)
    del del_me
    kept = torch.ones(2**18)
    # Of a process that keeps its memory some pages may have been there before.
    assert 0.9 * 2**26 <= peak.over_start() < 2**26 + 2**25 and kept.any()


@pytest.mark.parametrize(
    ("name", "flops", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA GH200 480GB", 989e12, 4.0e12),
        ("NVIDIA GB200", 2500e12, 8.0e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12),
        ("NVIDIA L4", None, None),
    ],
)
def test_stated_peaks_go_by_the_card(
    name: str, flops: float | None, bandwidth: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "device_name", lambda: name)
    assert (device.peak_flops(bf16=True), device.peak_bandwidth()) == (flops, bandwidth)
    assert device.peak_flops(bf16=False) is None
