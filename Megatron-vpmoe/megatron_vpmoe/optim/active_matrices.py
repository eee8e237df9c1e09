"""Which matrices take part in an update: an expert without a token has a gradient of zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_vpmoe.optim.matrix_stacks import Stack


def active_matrices(pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """1.0 where any element of a matrix's gradient differs from zero (or is NaN), else 0.0; [N, 1, 1].

    None where all matrices are known to be active: on a CPU, which need not wait to look at an answer, one pass finds
    that out in all but odd cases.

    Args:
        pieces: gradients of a stack, [n, R, C] each.
    """
    # The maximum is a CPU's fastest reduction without a temporary; a norm of 2 would underflow to zero.
    if not pieces[0].is_cuda and all(bool((grad.amax((1, 2)) != 0).all()) for grad in pieces):
        return None
    largest_N11 = pieces[0].new_empty(sum(map(len, pieces)), 1, 1)
    for grad, largest in zip(pieces, largest_N11.split([len(grad) for grad in pieces]), strict=True):
        torch.linalg.vector_norm(grad, math.inf, (1, 2), keepdim=True, out=largest)
    return largest_N11.ne_(0)


def by_piece(stack: Stack, number: float, active_N11: torch.Tensor | None) -> Sequence[float | torch.Tensor]:
    """For each piece of ``stack.take`` what its matrices get: ``number`` where they are active, else 0."""
    if active_N11 is None:
        return [number] * (len(stack.segments) if stack.in_place else 1)
    return stack.cut(number * active_N11)
