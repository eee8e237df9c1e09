"""A GPU on paper: the code decides as on one, and its tensors have shapes and no values.

Tensors of the card are fake ones of the CPU underneath, since a build of torch without CUDA cannot differentiate fake
tensors of CUDA; what asks them for their device is told the card. Tensors of the host stay real: where the two meet
without a copy, torch refuses. Values that are copied to the host are made up (``Counting``), and the wait is counted.

For a process of its own: what asks ``torch.cuda`` is answered as by a card until the end of the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from megatron_vpmoe.planning import stand_ins
from megatron_vpmoe.planning.counting import Counting

CARD = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_DEVICES = ("cpu", "cuda", "meta")


class _Inert:
    """A stream or an event: every method does nothing and returns an inert object."""

    device = CARD

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: type(self)()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Inert)

    __hash__ = object.__hash__


class _Placing(TorchFunctionMode):
    """Makes what is asked of the card there, and moves what is copied between it and the host."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting
        self._pinned: dict[int, Tensor] = {}  # which keeps them, so that nothing else gets their place

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        leaves, name = tree_leaves((args, kwargs)), getattr(func, "__name__", "")
        fake = next((leaf for leaf in leaves if isinstance(leaf, FakeTensor)), None)
        if name == "pin_memory":
            copy = args[0].clone()
            self._pinned[copy.untyped_storage()._cdata] = copy
            return copy
        if fake is not None and name in ("cpu", "tolist", "numpy"):
            return self._downloaded(fake) if name == "cpu" else getattr(self._downloaded(fake), name)()
        asked = kwargs.get("device")
        if asked is None and name not in ("__get__", "__set__"):
            asked = next((leaf for leaf in leaves if _is_device(leaf)), None)
        to_card = type(asked) is int or _is_card(asked)
        if fake is not None and asked is not None and str(asked) == "cpu":
            return self._downloaded(fake, waits=not kwargs.get("non_blocking"))
        if to_card:
            args, kwargs = tree_map(lambda leaf: _CPU if _is_card(leaf) else leaf, (args, kwargs))
            if "device" in kwargs:
                kwargs["device"] = _CPU
            if fake is None and any(isinstance(leaf, Tensor) for leaf in leaves):
                with self._counting.making(on_card=False):
                    return self._uploaded(func(*args, **kwargs), non_blocking=bool(kwargs.get("non_blocking")))
            if name == "tensor":
                with self._counting.making(on_card=False):
                    return self._uploaded(func(*args, **kwargs), non_blocking=False)
        if func is torch.nn.functional.rms_norm and fake is not None:
            return stand_ins.rms_norm(self._counting, args[0], kwargs["weight"])
        with self._counting.making(on_card=to_card or fake is not None):
            return func(*args, **kwargs)

    def _uploaded(self, tensor: Tensor, *, non_blocking: bool) -> Tensor:
        if not (non_blocking and tensor.untyped_storage()._cdata in self._pinned):
            self._counting.waits()
        return self._counting.as_one("upload", 1, lambda: self.made(tensor), [])

    def _downloaded(self, tensor: Tensor, *, waits: bool = True) -> Tensor:
        self._counting.waits(int(waits))
        with self._counting.making(on_card=False):
            return torch.full(tensor.shape, self._counting.value_of(tensor), dtype=tensor.dtype)

    def made(self, like: Tensor) -> Tensor:
        """A tensor of the card, of the shape, layout and dtype of any tensor."""
        size, stride, dtype = tuple(like.shape), like.stride(), like.dtype
        with self._counting.making(on_card=True), torch._C.DisableTorchFunction():
            return torch.empty_strided(size, stride, dtype=dtype, device=_CPU)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in _DEVICES)


def _is_card(value: Any) -> bool:
    return _is_device(value) and str(value).startswith("cuda")


@contextlib.contextmanager
def on_paper(name: str, memory: int, devices: int, counting: Counting) -> Iterator[Callable[[Tensor], Tensor]]:
    """Pretend that this machine has GPUs.

    Args:
        name: of the GPU, as its driver tells it.
        memory: bytes of one.
        devices: of this machine.
        counting: what counts; entered here.

    Yields:
        a function: a tensor of the card, shaped like any tensor.
    """
    timeline = type("Timeline", (_Inert,), {"synchronize": lambda *_: counting.waits()})
    host_only = {
        "is_available": lambda: True, "device_count": lambda: devices, "current_device": lambda: 0,
        "set_device": lambda *_: None, "get_device_name": lambda *_: name, "mem_get_info": lambda *_: (memory, memory),
        "get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: SimpleNamespace(major=9),
        "current_stream": timeline, "default_stream": timeline,
        "stream": lambda _: contextlib.nullcontext(), "Stream": timeline, "Event": timeline,
        "manual_seed": lambda *_: None, "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda *_, **__: None, "_lazy_call": lambda *_, **__: None, "_lazy_init": lambda: None,
        "synchronize": lambda *_: counting.waits(), "memory_allocated": lambda *_: 0, "empty_cache": lambda: None,
    }  # fmt: skip
    of_fake: Any = vars(FakeTensor)["device"]
    answers = {
        "device": property(lambda self: of_fake.fget(self) if counting.inside else CARD),
        "is_cuda": property(lambda _: not counting.inside),
        "is_cpu": property(lambda _: counting.inside),
        "tolist": lambda self: self.cpu().tolist(),
    }
    placing = _Placing(counting)
    run_backward: Any = vars(torch.autograd)["_engine_run_backward"]

    def backward(*arguments: Any, **keywords: Any) -> Any:
        with placing:  # torch takes a mode away while it runs a function, and this one runs all of ours
            return run_backward(*arguments, **keywords)

    with contextlib.ExitStack() as held:
        held.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        for attribute, answer in host_only.items():
            held.enter_context(mock.patch.object(torch.cuda, attribute, answer))
        held.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", host_only["get_rng_state"]))
        for attribute, answer in answers.items():
            held.enter_context(mock.patch.object(FakeTensor, attribute, answer, create=True))
        held.enter_context(counting)
        held.enter_context(placing)
        yield placing.made


def fake_mode() -> FakeTensorMode:
    """Of the card's tensors; refuses to mix them with others."""
    return FakeTensorMode(allow_non_fake_inputs=False)
