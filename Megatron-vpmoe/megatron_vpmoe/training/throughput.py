"""Real tokens per second between two reports, and the share of the device's peak that they use."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from megatron_vpmoe.config import training_flops_per_token
from megatron_vpmoe.runtime import device, distributed

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


class Throughput:
    """A stopwatch over training steps alone; whatever happens between two steps pauses it by ``restart``.

    A GPU works on after the calls that gave it work have returned: the clock is read when it has finished.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self._flops_per_token = training_flops_per_token(cfg)
        peak = device.peak_flops(bf16=cfg.training.bf16)
        self._peak = None if peak is None else peak * distributed.world_size()
        self._tokens, self._seconds, self._since = 0.0, 0.0, time.perf_counter()
        self._update_began = self._update_seconds = 0.0

    def restart(self) -> None:
        """What happened since the last step was not training."""
        device.finish()
        self._since = time.perf_counter()

    def updating(self) -> None:
        """The step's batches are there; what follows is its update."""
        self._update_began = time.perf_counter()

    def step(self, real_tokens: float) -> None:
        """A step over ``real_tokens`` (of all ranks, padding left out) is done."""
        device.finish()
        now = time.perf_counter()
        self._tokens += real_tokens
        self._seconds += now - self._since
        self._since, self._update_seconds = now, now - self._update_began

    def report(self) -> dict[str, float]:
        """Tokens per second since the last report, seconds of the last update (beside them, a step waits for its
        batches), and MFU in percent where the device's peak is known.
        """
        rate = self._tokens / max(self._seconds, 1e-9)
        self._tokens = self._seconds = 0.0
        values = {"throughput/tokens_per_second": rate, "throughput/seconds_updating": self._update_seconds}
        if self._peak is not None:
            values["throughput/mfu_pct"] = 100.0 * rate * self._flops_per_token / self._peak
        return values
