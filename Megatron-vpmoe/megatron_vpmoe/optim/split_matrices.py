"""Matrices of which every tensor-parallel rank holds a part: rows (column-parallel) or columns (row-parallel).

The singular vectors are those of the whole matrix, so parts have to meet. Each rank takes its share of a stack's
matrices whole, orthogonalises them, and hands the parts back: two all-to-alls, and no product is computed twice. In
which order the parts are put together does not matter, since permuting the rows of a matrix permutes those of its
orthogonalised form.

Shapes: N matrices in a stack, T tensor-parallel ranks, R rows and C columns of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist


class Split(NamedTuple):
    """How the matrices of a stack are split.

    Attributes:
        dim: 0, each rank has rows; 1, columns.
        group: the ranks.
    """

    dim: int
    group: dist.ProcessGroup

    def apply_whole(self, part_NRC: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """This rank's part [N, R, C] of ``function`` of the whole matrices; a collective of the group.

        Args:
            part_NRC: this rank's part of every matrix.
            function: matrices to matrices of the same shape, each by itself; zero matrices to zero ones. It gets
                [ceil(N / T), R T, C] or [ceil(N / T), R, C T], filled up with zero matrices.
        """
        ranks, (count, rows, cols) = self.group.size(), part_NRC.shape
        share = -(-count // ranks)
        sent = part_NRC.new_zeros(ranks * share, rows, cols)
        sent[:count] = part_NRC
        parts_TNRC = self._exchange(sent).view(ranks, share, rows, cols)
        if self.dim == 0:
            whole = function(parts_TNRC.transpose(0, 1).reshape(share, ranks * rows, cols))
            parts_TNRC = whole.view(share, ranks, rows, cols).transpose(0, 1)
        else:
            whole = function(parts_TNRC.permute(1, 2, 0, 3).reshape(share, rows, ranks * cols))
            parts_TNRC = whole.view(share, rows, ranks, cols).permute(2, 0, 1, 3)
        return self._exchange(parts_TNRC.reshape(ranks * share, rows, cols))[:count]

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of each rank's own; a collective of the group."""
        total = partial.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def _exchange(self, sent: torch.Tensor) -> torch.Tensor:
        """Stretch t of ``sent`` goes to rank t; what came from rank t is stretch t of the result."""
        sent = sent.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received
