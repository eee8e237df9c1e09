"""The device of this run, and the one place that patches Megatron-Core: its answers where something is missing.

Megatron-Core 0.16.1 takes Transformer Engine and CUDA for granted. `prepare` answers each assumption in the tables of
docs/megatron.md ("Without Transformer Engine", "On a machine with no GPU"), which a test holds to upstream's lines.
The two kinds are given apart: each only where that is missing. Without a GPU, by two means only:

* the name ``torch`` inside the modules of ``megatron.core`` is bound to a stand-in that maps ``device="cuda"`` to the
  CPU and answers ``torch.cuda.*``; torch itself, and everybody else's view of it, stays as it is;
* a few functions are replaced where the assumption is not reachable through that name.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.runtime.machines import machine_of

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h

_IMPORTED = (
    "parallel_state",
    "tensor_parallel",
    "distributed",
    "distributed.finalize_model_grads",
    "optimizer",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer_param_scheduler",
    "pipeline_parallel",
    "pipeline_parallel.schedules",
    "models.gpt.gpt_model",
    "models.gpt.gpt_layer_specs",
    "transformer.moe.moe_layer",
    "transformer.moe.token_dispatcher",
    "dist_checkpointing",
    "dist_checkpointing.strategies.torch",
    "datasets.indexed_dataset",
)


class _Inert:
    """A CUDA stream or event on a machine with neither: every method does nothing and returns an inert object."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: _Inert()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Inert)

    __hash__ = object.__hash__


class _CudaOnCpu(ModuleType):
    """What ``torch.cuda`` answers inside megatron.core when there is no GPU."""

    Stream = Event = _Inert

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.random = self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def current_stream(*_args: Any) -> _Inert:
        return _Inert()

    @staticmethod
    def stream(_stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def synchronize(*_args: Any) -> None: ...

    @staticmethod
    def get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)


class _TorchOnCpu(ModuleType):
    """What ``torch`` answers inside megatron.core when there is no GPU: ``device="cuda"`` means the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu()
        for factory in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
            setattr(self, factory, _on_cpu(getattr(torch, factory)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def has_gpu() -> bool:
    """Whether this process sees a CUDA device."""
    return torch.cuda.is_available()


def current_device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def compute_capability() -> tuple[int, int] | None:
    """Of the GPU that this process computes on; None where there is none."""
    return torch.cuda.get_device_capability() if has_gpu() else None


def of_this_thread() -> Callable[[], None]:
    """What another thread calls to work on the device of this one; else it would take the first."""
    if not has_gpu():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def finish() -> None:
    """Wait until the device has done all that it was given; a CPU is never behind."""
    if has_gpu():
        torch.cuda.synchronize()


def keep_memory() -> None:
    """On a CPU, have the C library keep what is freed, as torch does on a GPU.

    A step asks for the same tensors again; a large one given anew costs a fault a page, which is more than the
    arithmetic of 256 experts' gradients (docs/LOG.md, "experts"). Libraries other than glibc have no such settings.
    """
    mallopt = None if has_gpu() else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def distributed_backend() -> str:
    """``nccl`` on GPUs, ``gloo`` on CPU."""
    return "nccl" if has_gpu() else "gloo"


def available_memory() -> tuple[int, str, int]:
    """Memory for one run.

    Returns:
        bytes per device, the device's name, the number of devices. On CPU all processes share one device: the RAM that
        is free now.
    """
    if has_gpu():
        free, _total = torch.cuda.mem_get_info()
        return free, torch.cuda.get_device_name(), torch.cuda.device_count()
    import psutil

    return psutil.virtual_memory().available, "CPU", 1


def device_name() -> str:
    """As its driver calls the GPU that this process computes on; "CPU" where there is none."""
    return torch.cuda.get_device_name() if has_gpu() else "CPU"


def peak_flops(*, bf16: bool) -> float | None:
    """The stated matmul peak of this device in FLOP/s; None where it is not known (CPUs, fp32, other GPUs)."""
    machine = machine_of(device_name()) if bf16 else None
    return None if machine is None else machine.peak(bf16=True)


def peak_bandwidth() -> float | None:
    """The stated bandwidth of this device's memory in byte/s; None where it is not known."""
    machine = machine_of(device_name())
    return None if machine is None else 1e9 * machine.memory_gb_s


def check_compiler(source: str, otherwise: str) -> None:
    """Refuse what torch compiles for a CPU where no C++ compiler is; raises `DeviceError`.

    Args:
        source: what asks for it.
        otherwise: what to do without.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise DeviceError(
            f"there is no C++ compiler {compiler!r}, which torch compiles for a CPU with",
            source=source,
            remedy=f"install one, name it with CXX, or {otherwise}",
        )


@functools.cache
def prepare() -> None:
    """Import megatron.core so that it runs on this machine; call before anything else imports it.

    Where a GPU is present it answers for a missing Transformer Engine alone. Idempotent.

    Raises:
        DeviceError: megatron.core was imported before and has bound its compiled functions already.
    """
    # To a layer with experts that is not its own upstream hands no process groups, and says so: ours takes the same.
    layers_log = logging.getLogger("megatron.core.transformer.transformer_layer")
    layers_log.addFilter(lambda record: "Unknown MLP type" not in record.getMessage())
    if has_gpu():
        _answer_without_transformer_engine()
        return
    if "megatron.core.jit" in sys.modules:
        raise DeviceError(
            "megatron.core was imported before device.prepare() could answer for the missing GPU",
            source="the import order of this process",
            remedy="import megatron_vpmoe.model (or call prepare()) before megatron.core",
        )
    compile_function, torch.compile = torch.compile, _compile_nothing  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # Upstream warns once a module that Apex and Transformer Engine are absent; without a GPU they always are.
            warnings.filterwarnings("ignore", message=".*Apex .*not installed")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="megatron.core")
            for name in _IMPORTED:
                importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = compile_function
    stand_in = _TorchOnCpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    _answer_functions()
    _answer_without_transformer_engine()


def _compile_nothing(model: Any = None, **_options: Any) -> Any:
    return model if model is not None else (lambda function: function)


def _answer_functions() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *_args, **_kwargs: torch.set_rng_state(new_state)
    random_log = logging.getLogger(random.__name__)
    random_log.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _move_tensor_to_cpu
    torch.Tensor.type = _answer_type(torch.Tensor.type)  # type: ignore[method-assign]


def _answer_without_transformer_engine() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Upstream's contract on tensors that live on the CPU already: gloo's all-to-all wants numpy split sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _answer_type(tensor_type: Any) -> Any:
    @functools.wraps(tensor_type)
    def answer(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        if isinstance(result, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return answer
