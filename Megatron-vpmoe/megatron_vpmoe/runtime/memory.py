"""What this process holds of the device's memory, or where there is no GPU of the machine's."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vpmoe.runtime.device import has_gpu


def memory_in_use() -> dict[str, int]:
    """Bytes: ``allocated`` by tensors and ``reserved`` for them on a GPU, ``resident`` of a process on a CPU; ``peak``,
    the most that was allocated, or resident, since the process began.
    """
    if has_gpu():
        peak = torch.cuda.max_memory_allocated()
        return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(), "peak": peak}
    return {"resident": process_status("VmRSS"), "peak": process_status("VmHWM")}


def process_status(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS (resident) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
