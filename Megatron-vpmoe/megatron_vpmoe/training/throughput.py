"""How fast a run is: real tokens per second between two reports, and what of the devices' peak that is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_vpmoe.config import training_flops_per_token
from megatron_vpmoe.config.geometry import output_training_flops
from megatron_vpmoe.data.batch import PADDING, Batch
from megatron_vpmoe.runtime import device, distributed

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


class Throughput:
    """A stopwatch over training steps alone; whatever happens between two steps pauses it by ``restart``.

    A GPU works on after the calls that gave it work have returned: the clock is read when it has finished.

    FLOPs are the model's (``config/geometry.py``): a recomputed product counts once, a padded position not at all, of
    the output layer what supervised positions ask, and of scores those of keys in the token's own document and window,
    as counted in this rank's batches.

    Args:
        cfg: the run.
        normuon_flops: of NorMuon's products in one step of all ranks; they are no work of the model's.
    """

    def __init__(self, cfg: RunConfig, normuon_flops: float = 0.0) -> None:
        self._ranks, self._normuon_flops = distributed.world_size(), normuon_flops
        peak = device.peak_flops(bf16=cfg.training.bf16)
        self._peak = None if peak is None else peak * self._ranks
        self.note: str | None = None
        """Why there is no MFU, where there could be one."""
        if device.has_gpu() and peak is None:
            what = f"the peak of {device.device_name()!r}" if cfg.training.bf16 else "a peak for fp32"
            self.note = f"no MFU: {what} is not in runtime/machines.toml"
        # Linear in the keys of each window.
        windows = sorted({cfg.model.window_size, None}, key=str)
        without_keys = training_flops_per_token(cfg, keys=lambda _: 0.0)
        self._flops_per_key = {
            window: training_flops_per_token(cfg, keys=lambda of, window=window: float(of == window)) - without_keys
            for window in windows
        }
        self._flops_of_output = float(output_training_flops(cfg))
        self._flops_of_layers = without_keys - self._flops_of_output
        self._tokens = self._seconds = self._flops = 0.0
        self._steps, self._since = 0, time.perf_counter()
        self._of_steps: list[float] = []
        self._update_began = self._update_seconds = self._waiting = 0.0
        self.waited = 0.0
        """Seconds in which the last step's batches were waited for."""

    def restart(self) -> None:
        """What happened since the last step was not training."""
        device.finish()
        self._since = time.perf_counter()

    def updating(self) -> None:
        """The step's batches are there; what follows is its update."""
        self._update_began = time.perf_counter()
        self.waited = self._update_began - self._since
        self._waiting += self.waited

    def step(self, real_tokens: float, batches: Sequence[Batch]) -> None:
        """A step over ``real_tokens`` (of all ranks, without padding) is done; ``batches``: this rank's, on the CPU."""
        device.finish()
        now = time.perf_counter()
        self._steps += 1
        self._tokens += real_tokens
        self._flops += real_tokens * self._flops_per_token(batches)
        self._seconds += now - self._since
        self._of_steps.append(now - self._since)
        self._since, self._update_seconds = now, now - self._update_began

    def _flops_per_token(self, batches: Sequence[Batch]) -> float:
        seen = [batch.position_ids[batch.document_id != PADDING] + 1 for batch in batches]
        flops = self._flops_of_output * sum(len(batch.supervised) for batch in batches)
        for window, of_key in self._flops_per_key.items():
            flops += of_key * sum(int((keys if window is None else keys.clamp(max=window)).sum()) for keys in seen)
        return self._flops_of_layers + flops / max(1, sum(len(keys) for keys in seen))

    @property
    def typical_step(self) -> float | None:
        """Median seconds of a step of this run, without the first, which makes what later ones have; None: too few."""
        return statistics.median(self._of_steps[1:]) if len(self._of_steps) > 1 else None

    def report(self) -> dict[str, float]:
        """Since the last report: tokens and model TFLOP per second of all ranks, and of a GPU; MFU in percent where the
        device's peak is known, and NorMuon's products as a share of the same peak; of a step, in the mean, the seconds
        in which its batches were waited for. Of the last step the seconds of its update, which follows that.
        """
        seconds = max(self._seconds, 1e-9)
        rate, flops, normuon = (
            self._tokens / seconds,
            self._flops / seconds,
            self._normuon_flops * self._steps / seconds,
        )
        waiting = self._waiting / max(1, self._steps)
        self._tokens = self._seconds = self._flops = self._waiting = 0.0
        self._steps = 0
        values = {
            "throughput/tokens_per_second": rate,
            "throughput/model_tflops": flops / 1e12,
            "throughput/seconds_updating": self._update_seconds,
            "throughput/seconds_waiting": waiting,
        }
        if device.has_gpu():
            values["throughput/tokens_per_second_per_gpu"] = rate / self._ranks
            values["throughput/model_tflops_per_gpu"] = flops / 1e12 / self._ranks
        if self._peak is not None:
            values["throughput/mfu_pct"] = 100.0 * flops / self._peak
            values["throughput/normuon_pct"] = 100.0 * normuon / self._peak
        return values
