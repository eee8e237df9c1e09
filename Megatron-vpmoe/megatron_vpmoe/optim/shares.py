"""Which rank of a data-parallel group updates which part of each parameter, and how the parts come together again.

Every rank holds all parameters and, after Megatron's all-reduce, all gradients. The optimizer's work and state are cut
into shares: one rank steps a share, keeps its state and its fp32 masters, and the updated weights are all-gathered. A
share consists of pieces, each a run of indices of dimension 0 of one parameter: whole 2-D weights (a matrix is never
cut), some experts of a stack, some rows of the embedding.
"""

# torch._foreach_*: one call (one launch on a GPU) over a list of tensors; torch does not export the names to checkers.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_vpmoe.config.memory import GATHER_BYTES


class Units(NamedTuple):
    """How a parameter may be divided: ``count`` equal parts along dimension 0, each of a cost."""

    count: int
    cost: int


@dataclass(frozen=True)
class Piece:
    """``length`` indices of dimension 0 of ``param`` from ``start``; a scalar is one index."""

    param: torch.nn.Parameter
    start: int
    length: int

    @property
    def whole(self) -> bool:
        """Whether the piece is all of its parameter."""
        return self.length == (self.param.shape[0] if self.param.ndim else 1)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece of a tensor shaped like the parameter: a view."""
        return tensor if self.whole else tensor.narrow(0, self.start, self.length)


def divide(units: Sequence[Units], ranks: int) -> list[list[tuple[int, int]]]:
    """Cut a sequence of parameters into ``ranks`` consecutive shares of about equal cost.

    All units stand in a line; a unit belongs to the rank in whose stretch of the total its middle falls. A share
    exceeds the mean by at most the cost of one unit.

    Args:
        units: of each parameter.
        ranks: size of the group.

    Returns:
        for each parameter and rank the first unit and the one after the last (equal: none).
    """
    total = sum(count * cost for count, cost in units)
    shares: list[list[tuple[int, int]]] = []
    before = 0
    for count, cost in units:
        # The first unit u of rank r has its middle, before + (u + 1/2) cost, at or beyond total r / ranks.
        first = [
            min(count, max(0, -((ranks * (2 * before + cost) - 2 * total * rank) // (2 * cost * ranks))))
            for rank in range(ranks)
        ]
        shares.append(list(zip(first, [*first[1:], count], strict=True)))
        before += count * cost
    return shares


def pieces_of_ranks(params: Sequence[torch.nn.Parameter], units: Sequence[Units], ranks: int) -> list[list[Piece]]:
    """The pieces of each rank, in the order of ``params``."""
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for param, unit, share in zip(params, units, divide(units, ranks), strict=True):
        rows = (param.shape[0] if param.ndim else 1) // unit.count
        for rank, (first, after) in enumerate(share):
            if after > first:
                pieces[rank].append(Piece(param, first * rows, (after - first) * rows))
    return pieces


class ParameterGather:
    """Brings the updated pieces of all ranks into everybody's parameters.

    Pieces of one dtype are strung together and sent in buckets of equal size, the last of them padded.

    Args:
        pieces: of each rank of the group.
        group: the data-parallel group.
        bucket_bytes: what all ranks together send at a time.
    """

    def __init__(self, pieces: Sequence[Sequence[Piece]], group: dist.ProcessGroup, bucket_bytes: int = GATHER_BYTES):
        self._pieces, self._group, self._bucket_bytes = pieces, group, bucket_bytes
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._dtypes = sorted({piece.param.dtype for share in pieces for piece in share}, key=str)

    @torch.no_grad()
    def run(self) -> None:
        """Gather; a collective of the group."""
        if self._ranks == 1:
            return
        for dtype in self._dtypes:
            flat = [
                [piece.of(piece.param.data).reshape(-1) for piece in share if piece.param.dtype == dtype]
                for share in self._pieces
            ]
            sizes = [sum(len(view) for view in views) for views in flat]
            bucket = min(max(sizes), max(1, self._bucket_bytes // (self._ranks * dtype.itemsize)))
            for start in range(0, max(sizes), bucket):
                self._gather_bucket([_cut(views, start, bucket) for views in flat], bucket, dtype)

    def _gather_bucket(self, views: list[list[torch.Tensor]], size: int, dtype: torch.dtype) -> None:
        device = next(view.device for share in views for view in share)
        sent = torch.empty(size, dtype=dtype, device=device)
        received = torch.empty(self._ranks * size, dtype=dtype, device=device)
        _copy(_slots(sent, views[self._rank]), views[self._rank])
        # As bytes: gloo knows fewer dtypes than the parameters have.
        dist.all_gather_single(received.view(torch.uint8), sent.view(torch.uint8), group=self._group)
        for rank, share in enumerate(views):
            if rank != self._rank:
                _copy(share, _slots(received[rank * size : (rank + 1) * size], share))


def _cut(views: Sequence[torch.Tensor], start: int, length: int) -> list[torch.Tensor]:
    """The part from ``start`` to ``start + length`` of the views strung together."""
    parts, position = [], 0
    for view in views:
        low, high = max(start - position, 0), min(start + length - position, len(view))
        if low < high:
            parts.append(view[low:high])
        position += len(view)
    return parts


def _slots(buffer: torch.Tensor, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Consecutive stretches of ``buffer`` as long as the views."""
    slots, position = [], 0
    for view in views:
        slots.append(buffer[position : position + len(view)])
        position += len(view)
    return slots


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
