"""The selective scan in C, for fp32 on a CPU: compiled once for the machine, kept, and called with pointers.

`selective_scan.c` is compiled when a scan is first asked for, by the machine's C compiler, into the user's cache. What
it computes is ``scan.selective_scan``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.files import write_atomically

_SOURCE = Path(__file__).with_name("selective_scan.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel.

    Raises:
        DeviceError: there is no C compiler, or it failed.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise DeviceError(
            "no C compiler, which the state space layers' scan on a CPU is compiled with",
            source=f"PATH, and CC = {os.environ.get('CC')!r}",
            remedy="install one (Debian: apt-get install gcc libc6-dev), or name it in CC",
        )
    processor = re.search(r"^flags.*$", _processor(), re.MULTILINE)
    told = [_SOURCE.read_text(), compiler, *_FLAGS, platform.machine(), processor.group() if processor else ""]
    name = f"selective_scan-{hashlib.sha256('|'.join(told).encode()).hexdigest()[:16]}.so"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpmoe" / name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, _compiled(compiler))
    return ctypes.CDLL(str(kept))


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    return described.read_text() if described.exists() else platform.processor()


def _compiled(compiler: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scan.so"
        ran = subprocess.run(
            [compiler, *_FLAGS, "-o", str(out), str(_SOURCE)], capture_output=True, text=True, check=False
        )
        if ran.returncode:
            raise DeviceError(
                f"{compiler} could not compile the scan: {ran.stderr.strip()[-500:]}",
                source=str(_SOURCE),
                remedy="name another C compiler in CC",
            )
        return out.read_bytes()


def _call(name: str, x_TD: Tensor, states: int, *tensors: Tensor | None) -> None:
    arguments = [None if each is None else ctypes.c_void_p(each.data_ptr()) for each in tensors]
    sizes = [ctypes.c_int64(size) for size in (len(x_TD), states, x_TD.shape[1])]
    getattr(library(), name)(*sizes, *arguments)


class KernelScan(Function):
    """As ``scan.ChunkedScan``, by the kernel; channels are filled up to whole vectors."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, decay_TD: Tensor, step_TD: Tensor, x_TD: Tensor, a_ND: Tensor, b_TN: Tensor, c_TN: Tensor
    ) -> tuple[Tensor, Tensor]:
        states, channels = a_ND.shape
        if states > library().scan_largest_state():
            raise ValueError(f"a state of {states} numbers; the kernel takes {library().scan_largest_state()}")
        filler = -channels % library().scan_lanes()
        if filler:
            decay_TD, step_TD, x_TD, a_ND = (functional.pad(t, (0, filler)) for t in (decay_TD, step_TD, x_TD, a_ND))
        y_TD, state_ND, starts = torch.empty_like(x_TD), torch.zeros_like(a_ND), None
        if any(ctx.needs_input_grad):
            starts = a_ND.new_empty(-(-len(x_TD) // library().scan_chunk()), *a_ND.shape)
        _call("scan_forward", x_TD, states, decay_TD, step_TD, x_TD, a_ND, b_TN, c_TN, y_TD, state_ND, starts)
        ctx.channels = channels
        ctx.save_for_backward(decay_TD, step_TD, x_TD, a_ND, b_TN, c_TN, starts)
        y_TD, state_ND = y_TD[:, :channels], state_ND[:, :channels]
        ctx.mark_non_differentiable(state_ND)
        return y_TD, state_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor, _state: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, starts = ctx.saved_tensors
        _, step_TD, x_TD, a_ND, b_TN, c_TN = inputs
        grad_TD = functional.pad(grad_TD, (0, x_TD.shape[1] - ctx.channels)).contiguous()
        of_a, of_state = torch.zeros_like(a_ND), torch.zeros_like(a_ND)
        of_step, of_x, of_b, of_c = (torch.empty_like(each) for each in (step_TD, x_TD, b_TN, c_TN))
        _call("scan_backward", x_TD, len(a_ND), *inputs, starts, grad_TD, of_state, of_step, of_x, of_a, of_b, of_c)
        of_step, of_x, of_a = (each[:, : ctx.channels] for each in (of_step, of_x, of_a))
        return None, of_step, of_x, of_a, of_b, of_c
