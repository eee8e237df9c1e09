"""Counts what a run of torch operations would make a GPU do, by pass and part of the step.

A dispatch mode sees every operation below autograd, forward and backward, with its shapes. Tensors of the card are fake
ones (`card`), so nothing is computed; those of the host are real, and what is done to them alone costs a GPU nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_vpmoe.planning.counts import Counts
from megatron_vpmoe.planning.kernels import Cost, cost, moved, operation
from megatron_vpmoe.planning.memory import Memory
from megatron_vpmoe.planning.open_ranges import Ranges

_ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}


class Counting(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        counts: so far; may be replaced by empty ones.
        ranges: the listener to the step's ranges.
        launched: kernels, ever.

    Args:
        fake: makes the card's tensors.
        rows: what integers that are asked for are taken to add up to: tokens times top-k.
        length_of: for a mask of the card, how many of its elements are taken to hold.
    """

    def __init__(self, fake: FakeTensorMode, rows: int, length_of: Callable[[Tensor], int]) -> None:
        super().__init__()
        self._rows = rows
        self.fake, self.counts, self.inside = fake, Counts(), False
        self._on_card = True  # where a tensor is made that has no model; what C++ makes for autograd is on the card
        self.ranges = Ranges()
        self.launched = 0
        self._length_of, self._memory = length_of, Memory()
        self._within_one = False

    def waits(self, count: int = 1) -> None:
        """The host waits here for the device."""
        if count:
            self.counts.syncs[self.ranges.of_pass, site()] += count

    @contextlib.contextmanager
    def making(self, *, on_card: bool) -> Iterator[None]:
        """New tensors belong there."""
        before, self._on_card = self._on_card, on_card
        try:
            yield
        finally:
            self._on_card = before

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count these tensors' memory under ``category`` from here on."""
        for tensor in tensors:
            self._memory.label(tensor, category)

    def _hold(self, tensor: Tensor) -> None:
        self._memory.hold(tensor, self.ranges.of_pass)
        peak = self.counts.peaks.get(self.ranges.of_pass, {})
        if self._memory.total > sum(peak.values()):
            self.counts.peaks[self.ranges.of_pass] = self._memory.by_category()

    def as_one(self, name: str, launches: int, run: Callable[[], Any], inputs: Iterable[Tensor], flops: int = 0) -> Any:
        """What ``run`` returns, counted as ``launches`` kernels that read the inputs and write the result."""
        self._within_one = True
        try:
            result = run()
        finally:
            self._within_one = False
        written = sum(map(moved, _tensors(result)))
        self._add(name, Cost(launches, flops, sum(map(moved, inputs)), written))
        return result

    def _add(self, name: str, of_one: Cost) -> None:
        if any(of_one) and not self._within_one:
            key = self.ranges.of_pass, self.ranges.part, name
            self.launched += of_one.launches
            self.counts.costs[key] = Cost(*map(sum, zip(self.counts.costs.get(key, Cost(0)), of_one, strict=True)))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, was_inside, self.inside = kwargs or {}, self.inside, True
        try:
            with torch._C.DisableTorchFunction():
                return self._dispatch(func, args, kwargs)
        finally:
            self.inside = was_inside

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = _tensors((args, kwargs))
        on_card = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        asked: Any = kwargs.get("device")
        if asked is not None and asked.type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        elif not on_card and (tensors or not self._on_card):
            return func(*args, **kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._number, (args, kwargs))
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        name = operation(func)
        if name == "index" or name == "index_put":
            args = self._chosen(name, args)
        if name == "segment_reduce" and not kwargs.get("unsafe"):
            self.waits()  # whether the lengths add up
        if name in _ASKS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waits()
            result = self._answer(name, args)
        elif on_card:
            result = func(*args, **kwargs)
        else:
            with self.fake:
                result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._hold(leaf)
        if func.namespace == "aten":
            of_one = cost(func, args, kwargs, result)
            kind = next((f" {t.dtype}".replace("torch.", "") for t in tensors), "") if of_one.flops else ""
            self._add(name + kind, of_one)
        return result

    def _number(self, tensor: Tensor) -> Tensor:
        """A number of the host may meet the card's tensors; anything larger may not."""
        if isinstance(tensor, FakeTensor) or tensor.dim():
            return tensor  # torch refuses what is not fake
        return self.fake.from_tensor(tensor)

    def _chosen(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """An index by a mask asks how many elements hold; one number written there does not."""
        if not any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            return args
        if name == "index_put" and args[2].numel() == 1:
            return args[0], [], *args[2:]
        self.waits()
        found: list[Any] = []
        for index in args[1]:
            is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            found += list(self._answer("nonzero", (index,)).unbind(1)) if is_mask else [index]
        return args[0], found, *args[2:]

    def value_of(self, tensor: Tensor) -> float:
        """What each element is taken to be where it is asked for."""
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            return 1
        return self._rows // max(1, tensor.numel())

    def _answer(self, name: str, args: tuple[Any, ...]) -> Any:
        """What the card was asked for."""
        asked: Tensor = args[0]
        if name in ("equal", "is_nonzero"):
            return True
        if name == "_local_scalar_dense":
            value = self.value_of(asked)
            return float(value) if asked.is_floating_point() else bool(value) if asked.dtype == torch.bool else value
        with self.fake:
            if name == "nonzero":
                return torch.empty(self._length_of(asked), asked.dim(), dtype=torch.int64)
            if name == "masked_select":
                return torch.empty(self._length_of(args[1]), dtype=asked.dtype)
            return torch.empty(self._length_of(asked), dtype=torch.int64)

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        at = next(place for place, argument in enumerate(func._schema.arguments) if argument.name == "process_group")
        ranks = torch.distributed.ProcessGroup.unbox(args[at]).size()
        key = self.ranges.of_pass, operation(func), ranks
        # Of results and what they are made from, a rank gives the smaller, but what it scatters is the larger.
        chosen = max if "reduce_scatter" in key[1] else min
        sizes = [sum(map(moved, of_one)) for each in args if (of_one := _tensors(each))]
        if key[1] == "barrier":
            sizes = [0]
            self.waits()
        calls, given = self.counts.collectives.get(key, (0, 0))
        self.counts.collectives[key] = calls + 1, given + chosen(sizes)
        # Torch knows few of these on fake tensors; the group does nothing, so that small ones make its handle.
        length = 1 if key[1].startswith("alltoall") else 0  # whose rows have to add up
        small = tree_map_only(Tensor, lambda tensor: torch.empty(tensor.shape[:length].numel() * length), args)
        return func(*small, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def site() -> str:
    """The innermost line of this package or of Megatron-Core that runs, outside of this room: "file:line"."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path: str = frame.f_code.co_filename
        for package in ("megatron_vpmoe", "megatron/core"):
            at = path.rfind(f"/{package}/")
            if at >= 0 and "/megatron_vpmoe/planning/" not in path:
                return f"{path[at + len(package) + 2 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
