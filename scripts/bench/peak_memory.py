"""Peak memory of a stretch of code over what was there before: of the allocator on a GPU, of the process on Linux."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


class PeakMemory:
    """Starts at construction; `over_start` reads the peak since then.

    On the CPU it is the resident set: memory that the C library keeps after it was freed is handed back first, so that
    it counts again when it is used again, and the kernel is told to start its peak anew.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._start = _status("VmRSS")

    def over_start(self) -> int:
        """Bytes."""
        return (torch.cuda.max_memory_allocated() if self._on_gpu else _status("VmHWM")) - self._start


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
