"""Runs that repeat bit for bit: what torch, cuBLAS, NCCL and torch's compiler are told, and what is refused.

Ours adds nothing by index in an order that a device chooses (`model/moe/expert_rows.py`); upstream and torch do in
places, and take another way, or end the run by name, once they are told.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch

from megatron_vpmoe.errors import DeviceError

_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_NVLS_ENABLE": ("0",),
}
"""Name -> what allows it, first what is set where nothing is: a fixed workspace for cuBLAS, which may else choose
another algorithm from call to call; no sums in the switch (NVLS), which Megatron-LM's deterministic mode rules out."""

_told = ExitStack()
"""What takes it back."""


def repeat_bit_for_bit() -> None:
    """Have this process compute the same bits from the same inputs; before its first work on a GPU.

    What the environment says already is kept.

    Raises:
        DeviceError: it does not allow that.
    """
    for name, allowing in _ENVIRONMENT.items():
        value = os.environ.setdefault(name, allowing[0])
        if value not in allowing:
            raise DeviceError(
                f"{name}={value} lets the same sums come out otherwise, and training.deterministic is on",
                source="environment",
                remedy=f"unset {name}, or export {' or '.join(allowing)}",
            )
    from torch._inductor import config

    as_before()
    torch.use_deterministic_algorithms(True)
    _told.callback(torch.use_deterministic_algorithms, False)
    # Else it would fill whatever is made without values, for programs that read it.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    _told.callback(torch._C._set_deterministic_fill_uninitialized_memory, True)
    _told.enter_context(config.patch(deterministic=True))  # kernels by rules, not by how long each took


def as_before() -> None:
    """Take ``repeat_bit_for_bit`` back, but for the environment."""
    _told.close()
