"""How the logical matrices of a set of parameters (``matrix_layout``) are gathered into stacks of one shape.

A plan lists stacks; a stack lists segments; a segment is one contiguous piece of a parameter and its place in the
stack. Gathering and scattering are one copy of all pieces each, or views: of experts that are many enough, piece by
piece.

Shapes: N matrices in a stack, R rows (out), C columns (in), E experts in a parameter.
"""

# torch._foreach_*: one call (one launch on a GPU) over a list of tensors; torch does not export the names to checkers.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megatron_vpmoe.config.orthogonal import slot_rows
from megatron_vpmoe.optim.matrix_layout import MatrixLayout, height

_IN_PLACE_SHARE, _IN_PLACE_BYTES = 4, 64 * 2**20
"""Experts of one parameter that fill a quarter of a stack, or so many bytes, are worked on where they lie."""
_ONE_LAUNCH = 320 * 65_536
"""Elements that a kernel over many tensors takes at the most (blocks times chunk of ATen's MultiTensorApply.cuh)."""


class Segment(NamedTuple):
    """``length`` entries of dimension 0 of parameter ``index`` (``unfused``), and where they lie in the stack."""

    index: int
    start: int
    length: int
    slot: int
    row: int | None
    """Row in matrix ``slot``; None: of experts, the matrices ``slot`` to ``slot + length``."""

    def in_param(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The view of this segment in ``tensors[index]``."""
        return tensors[self.index].narrow(0, self.start, self.length)

    def in_stack(self, stack_NRX: torch.Tensor) -> torch.Tensor:
        """The view of this segment in the stack; the last dimension is the columns or a single statistic."""
        if self.row is None:
            return stack_NRX.narrow(0, self.slot, self.length)
        return stack_NRX[self.slot].narrow(0, self.row, self.length)


@dataclass
class Stack:
    """N matrices of one group and kind, [R, C] or (``has_gaps``) with zeros for rows; R and C of a split one's part."""

    rows: int
    cols: int
    group: int
    routed: bool
    split: int | None = None
    in_place: bool = False
    has_gaps: bool = False
    count: int = 0
    segments: list[Segment] = field(default_factory=list)

    def take(
        self, statistics: Sequence[torch.Tensor], lists: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """The stack of tensors that are laid out like the parameters, [..., X].

        That of ``statistics``, [N, R, 1]; and of each of ``lists`` its pieces [n, R, C] in order: where they lie, if it
        is worked on in place, else one, a copy. What needs none is a view.
        """
        if not self.in_place:
            statistic_NR1, *stacks = self._gathered([statistics, *lists], dtype)
            return statistic_NR1, [[stack_NRC] for stack_NRC in stacks]
        (statistic_NR1,) = self._gathered([statistics], dtype)
        return statistic_NR1, [[x.to(dtype) for x in self._pieces(tensors)] for tensors in lists]

    def put(
        self,
        statistics: Sequence[torch.Tensor],
        statistic_NR1: torch.Tensor,
        lists: Sequence[tuple[Sequence[torch.Tensor], list[torch.Tensor]]],
    ) -> None:
        """Back where ``take`` had them from, but for views."""
        targets, sources = [], []
        for tensors, pieces in ((statistics, [statistic_NR1]), *lists):
            in_place = self.in_place and tensors is not statistics
            if tensors[self.segments[0].index].dtype != pieces[0].dtype or not (in_place or self._is_one):
                targets += self._pieces(tensors)
                sources += pieces if in_place else self.slots(pieces[0])
        copy_each(targets, sources)

    def _gathered(self, lists: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> list[torch.Tensor]:
        """[N, R, X] of each list: copies, made together, or views."""
        first = self.segments[0]
        if self._is_one:
            views = [first.in_param(tensors) for tensors in lists]
            return [(view if first.row is None else view.unsqueeze(0)).to(dtype) for view in views]
        new = torch.zeros if self.has_gaps else torch.empty
        like = [tensors[first.index] for tensors in lists]
        stacks = [new(self.count, self.rows, x.shape[-1], dtype=dtype, device=x.device) for x in like]
        slots = [slot for stack_NRX in stacks for slot in self.slots(stack_NRX)]
        copy_each(slots, [piece for tensors in lists for piece in self._pieces(tensors)])
        return stacks

    @property
    def _is_one(self) -> bool:
        """It is one piece of one parameter and can be worked on where it lies."""
        return len(self.segments) == 1 and not self.has_gaps

    def _pieces(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [segment.in_param(tensors) for segment in self.segments]

    def cut(self, stack_NRX: torch.Tensor) -> list[torch.Tensor]:
        """What stands beside each piece of ``take`` in a tensor of the whole stack: views."""
        return self.slots(stack_NRX) if self.in_place else [stack_NRX]

    def slots(self, stack_NRX: torch.Tensor) -> list[torch.Tensor]:
        """The part of each segment in a tensor of the whole stack: views."""
        return [segment.in_stack(stack_NRX) for segment in self.segments]


def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source to its target: many small ones at once; a large one alone, for which that would be no more."""
    together: dict[tuple[torch.dtype, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target.numel() >= _ONE_LAUNCH:
            target.copy_(source)
        else:
            together.setdefault((target.dtype, source.dtype), []).append((target, source))
    for pairs in together.values():
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


class _Kind(NamedTuple):
    """What the matrices of a stack have in common; the fields are ``Stack``'s."""

    rows: int
    cols: int
    group: int
    routed: bool
    split: int | None
    in_place: bool = False


class Member(NamedTuple):
    """One parameter as the plan sees it; the shape is that of the parameter ``unfused``."""

    shape: torch.Size
    layout: MatrixLayout
    group: int


def plan_stacks(
    members: Sequence[Member], *, stack_bytes: int, fill_flops: float = 0.0, element_size: int = 4
) -> list[Stack]:
    """Distribute the logical matrices of ``members`` over stacks of equal shape, group and kind.

    Matrices of fewer rows share a taller one's stack where that takes few zeros (``config.orthogonal.slot_rows``).
    Parameters of many experts share stacks that are worked on in place; of fewer, ones that are copied.

    Args:
        members: the parameters; ``Segment.index`` counts along them.
        stack_bytes: largest stack; a single matrix beyond it is a stack of its own.
        fill_flops: of Polar Express that a stack's zeros may take.
        element_size: bytes of one element of a stack.
    """
    plan: list[Stack] = []
    slots, open_stacks = _slots_of(members, fill_flops), dict[_Kind, Stack]()

    def shared_stack(key: _Kind, capacity: int) -> Stack:
        stack = open_stacks.get(key)
        if stack is None or stack.count == capacity:
            stack = open_stacks[key] = Stack(*key)
            plan.append(stack)
        return stack

    for index, (shape, layout, group) in enumerate(members):
        for runs in layout.matrices:
            own = _Kind(height(runs), shape[1], group, layout.routed, layout.split)
            key = own._replace(rows=slots[own])
            stack = shared_stack(key, _capacity(key, stack_bytes, element_size))
            stack.has_gaps |= key != own
            row = 0
            for start, length in runs:
                stack.segments.append(Segment(index, start, length, stack.count, row))
                row += length
            stack.count += 1
        if not layout.stacked:
            continue
        in_place = math.prod(shape) * element_size >= min(stack_bytes // _IN_PLACE_SHARE, _IN_PLACE_BYTES)
        key = _Kind(shape[1], shape[2], group, layout.routed, layout.split, in_place)
        start, capacity = 0, _capacity(key, stack_bytes, element_size)
        while start < layout.stacked:
            stack = shared_stack(key, capacity)
            length = min(capacity - stack.count, layout.stacked - start)
            stack.segments.append(Segment(index, start, length, stack.count, None))
            stack.count += length
            start += length
    return plan


def _slots_of(members: Sequence[Member], most: float) -> dict[_Kind, int]:
    """The rows of a stack that matrices of 2-D parameters have, by kind; parts of matrices have their own."""
    counts: dict[tuple[int, bool, int | None], Counter[tuple[int, int]]] = defaultdict(Counter)
    for shape, layout, group in members:
        for runs in layout.matrices:
            counts[group, layout.routed, layout.split][height(runs), shape[1]] += 1
    return {
        _Kind(rows, cols, *alike): slot
        for alike, of_shape in counts.items()
        for (rows, cols), slot in slot_rows(of_shape, most if alike[2] is None else 0.0).items()
    }


def _capacity(kind: _Kind, stack_bytes: int, element_size: int) -> int:
    return max(1, stack_bytes // (kind.rows * kind.cols * element_size))
