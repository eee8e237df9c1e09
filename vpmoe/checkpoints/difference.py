"""How two checkpoints differ: configuration, provenance, and every tensor, of which two at a time are in memory."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vpmoe.config.provenance import is_binding
from megatron_vpmoe.errors import CheckpointError
from vpmoe.checkpoints.contents import dtype_name, state_name
from vpmoe.checkpoints.places import Place, find, origin_of, state_of
from vpmoe.hf.convert import open_directory, read_config
from vpmoe.steps.receipt import changes
from vpmoe.weights import LazyTensor, Weights, megatron_checkpoint

PATTERNS = "quote a pattern, as '*router*'; vpmoe checkpoint inspect PATH --tensors '*' lists all names"
_AT_ONCE = 1 << 24
"""Elements that are widened to fp64 together."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of two checkpoints.

    Attributes:
        name: of it.
        only: "first" or "second" where the other has none.
        shapes: of both, where they differ.
        dtypes: of both, where they differ.
        equal: bit for bit.
        largest: absolute difference of two finite values.
        relative: the largest difference by the larger of the two.
        nonfinite: places where not both are finite and they are not the same.
    """

    name: str
    only: str | None = None
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    dtypes: tuple[str, str] | None = None
    equal: bool = False
    largest: float = 0.0
    relative: float = 0.0
    nonfinite: int = 0

    def __str__(self) -> str:
        if self.only is not None:
            return f"only in the {self.only}"
        if self.shapes is not None:
            return f"shapes {list(self.shapes[0])} and {list(self.shapes[1])}"
        if self.equal:
            return "equal bit for bit"
        said = f"max abs {self.largest:.3e}, max rel {self.relative:.3e}"
        said += f", {self.nonfinite} not finite" if self.nonfinite else ""
        return said + (f", {self.dtypes[0]} and {self.dtypes[1]}" if self.dtypes else "")


@dataclass(frozen=True)
class Pair:
    """Two folders, opened: no tensor is read yet.

    Attributes:
        configuration: a line for each field that differs; those marked forbid that one run continues the other.
        provenance: a line for each entry that differs.
        weights: of either, by name.
    """

    configuration: list[str]
    provenance: list[str]
    weights: tuple[Weights, Weights]

    @property
    def bytes(self) -> int:
        """That are to be read."""
        first, second = self.weights
        return sum(first[name].nbytes + second[name].nbytes for name in first if name in second)

    def tensors(self, tell: Callable[[str, int], None]) -> Iterator[Tensor]:
        """Each tensor of either; ``tell`` is told the name and the bytes of both once they are compared.

        Raises:
            CheckpointError: one cannot be read.
        """
        first, second = self.weights
        for name in dict.fromkeys((*first, *second)):
            if name not in first or name not in second:
                yield Tensor(name, only="first" if name in first else "second")
                continue
            yield compared(name, first[name], second[name])
            tell(name, first[name].nbytes + second[name].nbytes)


def opened(one: Path, other: Path, *, pattern: str = "*", weights_only: bool = False) -> Pair:
    """Two folders to compare; of a run its newest complete checkpoint.

    Weights of an HF directory go by our names where the other is none. Keys and shapes of a checkpoint are global ones,
    so that one which another layout wrote holds the same tensors.

    Args:
        pattern: of the tensors' names, a shell's.
        weights_only: leave out the optimizer's state.

    Raises:
        CheckpointError: nothing of the kind lies there, or no tensor has such a name.
        WeightsError: weights that are not what they are described to be.
    """
    places = find(one), find(other)
    as_ours = {place.kind == "HF directory" for place in places} == {True, False}
    found = tuple(_weights(place, as_ours=as_ours) for place in places)
    first, second = (
        {
            name: tensor
            for name, tensor in weights.items()
            if fnmatch.fnmatchcase(name, pattern) and not (weights_only and state_name(name) != "weights")
        }
        for weights in found
    )
    if not first and not second:
        raise CheckpointError("no tensor has such a name", source=f"--tensors {pattern}", remedy=PATTERNS)
    before, after = (_state(place) for place in places)
    lines = changes(before.get("config") or {}, after.get("config") or {})
    return Pair(
        [f"{line}  (binds)" if is_binding(*_field(line)) else line for line in lines],
        changes(before.get("provenance") or {}, after.get("provenance") or {}),
        (first, second),
    )


def _field(line: str) -> tuple[str, str]:
    section, _, name = line.partition(": ")[0].partition(".")
    return section, name.split(".")[0]


def _weights(place: Place, *, as_ours: bool) -> Mapping[str, LazyTensor]:
    if not as_ours:
        return place.tensors()
    if place.kind == "HF directory":
        return open_directory(place.path).weights
    return megatron_checkpoint.read_weights(place.newest())


def _state(place: Place) -> dict[str, Any]:
    if place.kind != "HF directory":
        return state_of(place.newest())
    config = read_config(place.path)
    return {"config": {"config.json": config}, "provenance": origin_of(config)}


def compared(name: str, one: LazyTensor, other: LazyTensor) -> Tensor:
    """The two tensors, read and compared in fp64."""
    if one.shape != other.shape:
        return Tensor(name, shapes=(one.shape, other.shape))
    first, second = (tensor.read().reshape(-1) for tensor in (one, other))
    dtypes = None if one.dtype == other.dtype else (dtype_name(one), dtype_name(other))
    if dtypes is None and torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
        return Tensor(name, equal=True)
    largest, relative, nonfinite = 0.0, 0.0, 0
    for a, b in zip(first.split(_AT_ONCE), second.split(_AT_ONCE), strict=True):
        a, b = a.double(), b.double()
        finite = a.isfinite() & b.isfinite()
        nonfinite += int((~finite & (a != b) & ~(a.isnan() & b.isnan())).sum())
        apart, scale = (a - b).abs()[finite], torch.maximum(a.abs(), b.abs())[finite]
        if apart.numel():
            largest = max(largest, float(apart.max()))
            relative = max(relative, float((apart / scale.clamp(min=torch.finfo(torch.float64).tiny)).max()))
    return Tensor(name, dtypes=dtypes, largest=largest, relative=relative, nonfinite=nonfinite)
