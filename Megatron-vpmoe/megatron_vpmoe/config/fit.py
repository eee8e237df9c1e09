"""Whether a run fits a machine: the estimate of its memory against what is there, and a refusal beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vpmoe.config.geometry import parameter_count
from megatron_vpmoe.config.memory import MemoryEstimate, gib, memory_estimate
from megatron_vpmoe.config.schema import RunConfig
from megatron_vpmoe.errors import DeviceError


@dataclass(frozen=True)
class FitReport:
    """What a run needs of one device and what is there, in bytes."""

    estimate: MemoryEstimate
    processes_per_device: int
    available: int
    device_kind: str

    @property
    def needed(self) -> int:
        """Bytes needed of one device, over the processes that share it."""
        return self.estimate.total * self.processes_per_device

    @property
    def fits(self) -> bool:
        """Whether the estimate is within what is available."""
        return self.needed <= self.available

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(value)}" for name, value in self.estimate.parts.items())
        sharing = f" x {self.processes_per_device} processes on it" if self.processes_per_device > 1 else ""
        return (
            f"{gib(self.needed)} needed of each device ({parts}{sharing}), "
            f"{gib(self.available)} free on {self.device_kind}"
        )


def fit_report(
    cfg: RunConfig,
    available_bytes_per_device: int,
    device_kind: str,
    device_count: int = 1,
    teacher: RunConfig | None = None,
) -> FitReport:
    """Compare the estimate with a machine.

    Args:
        cfg: the run.
        available_bytes_per_device: free memory of one device; on CPU that of the whole machine.
        device_kind: the device's name; "CPU" when all processes share the machine's memory.
        device_count: devices on this machine.
        teacher: see ``memory_estimate``.
    """
    on_cpu = device_kind.upper() == "CPU"
    sharing = math.ceil(cfg.parallel.nproc_per_node / max(1, device_count))
    estimate = memory_estimate(cfg, on_cpu=on_cpu, teacher=teacher)
    return FitReport(estimate, sharing, available_bytes_per_device, device_kind)


def check_fit(cfg: RunConfig, report: FitReport, nano_config: str | None) -> None:
    """Refuse a run that the machine cannot hold.

    Args:
        cfg: the run.
        report: from ``fit_report``.
        nano_config: path of the same run at a small geometry, if there is one.

    Raises:
        DeviceError: with the parameters, the estimate and what to try.
    """
    if report.fits:
        return
    count = parameter_count(cfg)
    remedy = "lower micro_batch_size, seq_length or nproc_per_node, or set recompute_granularity to full"
    if nano_config:
        remedy = f"the same design at a size that fits: vpmoe train {nano_config}"
    raise DeviceError(
        f"this machine cannot hold {cfg.training.run_name}: {count.total:,} parameters "
        f"({count.active:,} active); {report}",
        source="memory estimate, before anything was allocated",
        remedy=remedy,
    )
