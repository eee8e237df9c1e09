"""Tokens per second: of steps that the device has finished, and of nothing else."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_vpmoe.training.throughput import Throughput
from tests.tiny import tiny_config


class Device:
    """A clock, and a GPU that is still busy for ``behind`` seconds when the calls to it have returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.behind = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.finish)

    def work(self, calls: float, device: float) -> None:
        """Seconds that the calls take, and seconds that the device needs after them."""
        self.now, self.behind = self.now + calls, self.behind + device

    def finish(self) -> None:
        self.now, self.behind = self.now + self.behind, 0.0


@pytest.mark.usefixtures("single_process")
def test_the_clock_stops_when_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = Throughput(tiny_config(bf16=False))
    device = Device(monkeypatch)
    throughput.restart()
    for _ in range(3):
        device.work(calls=0.5, device=1.5)
        throughput.step(1000)
        device.work(calls=0.25, device=4)  # a validation pass
        throughput.restart()
    assert throughput.report()["throughput/tokens_per_second"] == pytest.approx(500)
