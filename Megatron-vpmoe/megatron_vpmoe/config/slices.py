"""How parameters lie in the buffers of gradients and weights, so that each data-parallel rank's slice has whole units.

A buffer is a sequence of buckets; a bucket is reduced and gathered in one call each. Its gradients are reduce-scattered
and its weights all-gathered in equal slices, one a rank. No unit is cut: a whole 2-D matrix, one expert of a stack, one
row of the embedding, a small parameter whole. Arithmetic alone: N ranks, sizes and offsets in elements.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from megatron_vpmoe.config.parameters import EMBEDDING, OUTPUT, ROUTED

ALIGNMENT = 8
"""Parameters begin at multiples of this: 16 bytes in bf16, which vectorised kernels and grouped products ask for."""
_SPARE = 16
"""A bucket that is large enough goes on while more than one part in so many is padding."""
_WHOLE = 8
"""A bucket of whole parameters has at least so many of the largest a rank: longest-first leaves under a part in so many
free."""
_MOST = 2
"""Where equal slices would take more than so many times the (aligned) elements, slices are unequal and not padded."""


class Units(NamedTuple):
    """How a parameter may be divided.

    Attributes:
        count: equal parts along dimension 0; 1: none.
        shape: of a part.
        alone: it has a bucket of its own, so that another stage divides its copy in the same way.
    """

    count: int
    shape: tuple[int, ...]
    alone: bool = False

    @property
    def size(self) -> int:
        """Elements of a part."""
        return math.prod(self.shape)

    @property
    def elements(self) -> int:
        """Of all parts."""
        return self.count * self.size


def is_divided(name: str) -> bool:
    """Whether the parameter's entries along dimension 0 may go to different ranks: experts, rows that AdamW updates."""
    return ROUTED in name or name.endswith((EMBEDDING, OUTPUT, ".mlp.router.weight"))


@dataclass(frozen=True)
class Bucket:
    """Where parameters lie, relative to the bucket's first element.

    Attributes:
        places: (index of a parameter, offset), ascending.
        cuts: N + 1 offsets; rank r has what lies between cuts r and r + 1.
        size: elements, those of no parameter included; a multiple of N.
        elements: of parameters.
        even: the slices are equal.
    """

    places: tuple[tuple[int, int], ...]
    cuts: tuple[int, ...]
    size: int
    elements: int
    even: bool

    @property
    def ready(self) -> int:
        """The first parameter: the backward pass comes to it last."""
        return min(index for index, _ in self.places)


_Layout = tuple[list[tuple[int, int]], list[int]]
"""Places and cuts of a bucket."""


@dataclass
class _Open:
    """A bucket that still takes parameters."""

    unit: int  # elements of a unit; 0: of whole parameters
    members: list[int] = field(default_factory=list)
    elements: int = 0
    largest: int = 0


def plan_buckets(params: Sequence[Units], ranks: int, bucket_elements: int) -> list[Bucket]:
    """Lay out parameters that are given in the order of the forward pass; buckets come in that of the backward pass.

    Args:
        params: at least one.
        ranks: N.
        bucket_elements: a bucket is closed when it has as many and little of it is padding.
    """
    closed: list[list[int]] = []
    divided: list[_Open] = []
    whole = _Open(0)
    last_whole: list[int] | None = None
    for index in reversed(range(len(params))):
        param = params[index]
        padding = -param.elements % (ranks * param.size)
        if param.alone or (
            param.count > 1 and 2 * param.elements >= bucket_elements and _SPARE * padding <= param.elements
        ):  # half a bucket need not wait for another half: the output layer for the embedding
            closed.append([index])
            continue
        if param.count == 1:
            bucket = whole
        else:
            bucket = next((b for b in divided if b.unit == param.size), None)
            if bucket is None:
                bucket = _Open(param.size)
                divided.append(bucket)
        bucket.members.append(index)
        bucket.elements += param.elements
        bucket.largest = max(bucket.largest, param.elements)
        if bucket is whole:
            if whole.elements >= max(bucket_elements, _WHOLE * ranks * whole.largest):
                last_whole = whole.members
                closed.append(last_whole)
                whole = _Open(0)
            continue
        padding = -bucket.elements % (ranks * bucket.unit)
        if bucket.elements >= bucket_elements and _SPARE * padding <= bucket.elements:
            closed.append(bucket.members)
            divided.remove(bucket)
    if last_whole is not None and whole.elements < _WHOLE * ranks * whole.largest:  # too few for slices of their own
        last_whole += whole.members
    elif whole.members:
        closed.append(whole.members)
    closed += [bucket.members for bucket in divided]
    return sorted((_laid_out(members, params, ranks) for members in closed), key=lambda bucket: -bucket.ready)


def _laid_out(members: Sequence[int], params: Sequence[Units], ranks: int) -> Bucket:
    """The parameters as one bucket: units of one shape side by side, the largest first."""
    first_seen = {params[i].shape: i for i in reversed(members)}
    order = sorted(members, key=lambda i: (-params[i].size, -first_seen[params[i].shape], -i))
    elements = sum(params[i].elements for i in order)
    places, cuts = _bins(order, params, ranks) if params[order[0]].count == 1 else _line(order, params, ranks)
    if cuts[-1] <= _MOST * sum(_aligned(params[i].elements) for i in order):
        return Bucket(tuple(places), tuple(cuts), cuts[-1], elements, even=True)
    places, cuts = _unequal(order, params, ranks)
    size = -(-cuts[-1] // (ranks * ALIGNMENT)) * ranks * ALIGNMENT
    return Bucket(tuple(places), tuple(cuts), size, elements, even=False)


def _line(order: Sequence[int], params: Sequence[Units], ranks: int) -> _Layout:
    """Parameters of one unit one after another; slices are multiples of it, and so are their offsets."""
    places, end = _in_line(order, params, at_multiples=True)
    unit = params[order[0]].size
    share = -(-end // (ranks * unit)) * unit
    return places, [share * rank for rank in range(ranks + 1)]


def _bins(order: Sequence[int], params: Sequence[Units], ranks: int) -> _Layout:
    """Each parameter whole in the slice that has least so far."""
    loads = [(0, rank) for rank in range(ranks)]
    bins: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for index in order:
        load, rank = heapq.heappop(loads)
        bins[rank].append((index, load))
        heapq.heappush(loads, (_aligned(load + params[index].elements), rank))
    share = max(load for load, _ in loads)
    places = [(index, rank * share + offset) for rank, of_rank in enumerate(bins) for index, offset in of_rank]
    return places, [share * rank for rank in range(ranks + 1)]


def _unequal(order: Sequence[int], params: Sequence[Units], ranks: int) -> _Layout:
    """Parameters one after another; a unit is the rank's in whose equal part of all elements it begins."""
    places, end = _in_line(order, params, at_multiples=False)
    total, before, cuts = sum(params[i].elements for i in order), 0, [0]
    for index, offset in places:
        count, size = params[index].count, params[index].size
        while len(cuts) < ranks:
            # The first unit u that begins, at before + u size, at or beyond total r / N.
            unit = max(0, -((ranks * before - total * len(cuts)) // (size * ranks)))
            if unit >= count:
                break
            cuts.append(offset + unit * size)
        before += count * size
    cuts += [end] * (ranks + 1 - len(cuts))
    return places, cuts


def _in_line(order: Sequence[int], params: Sequence[Units], *, at_multiples: bool) -> tuple[list[tuple[int, int]], int]:
    """Offsets, of their units multiples where that is asked, and where the last one ends."""
    places, end = [], 0
    for index in order:
        step = math.lcm(params[index].size, ALIGNMENT) if at_multiples else ALIGNMENT
        offset = -(-end // step) * step
        places.append((index, offset))
        end = offset + params[index].elements
    return places, end


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def starts(buckets: Sequence[Bucket], ranks: int) -> list[int]:
    """Where each bucket begins in the buffer, and the buffer's end."""
    step = math.lcm(ranks, ALIGNMENT)
    return list(accumulate((-(-bucket.size // step) * step for bucket in buckets), initial=0))
