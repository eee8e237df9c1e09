"""Tensor Product Attention: queries, keys and values as products of two factors (arXiv 2501.06425).

For each token, A [heads, rank] and B [rank, D] are both linear in the hidden state, and the projection is A B / rank.
The rows of the two weight matrices are ordered A_q [H·Rq], A_k [G·R], A_v [G·R] and B_q [Rq·D], B_k [R·D], B_v [R·D].

Over T tensor-parallel ranks the A factors are split by head and group: a rank has the rows of its own H / T heads and
G / T groups, in the same order of sections. The B factors belong to all heads and every rank has them whole.

Shapes: S sequence, B batch, H query heads, G KV groups, D head dim, Rq query rank, R rank of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TPAGeometry:
    """The sizes of one tensor-product projection."""

    num_heads: int
    num_groups: int
    head_dim: int
    q_rank: int
    rank: int

    def part(self, ranks: int) -> TPAGeometry:
        """What one of ``ranks`` tensor-parallel ranks has; heads and groups must be divisible by it."""
        return replace(self, num_heads=self.num_heads // ranks, num_groups=self.num_groups // ranks)

    @property
    def a_sizes(self) -> tuple[int, int, int]:
        """Rows of A_q, A_k, A_v."""
        return self.num_heads * self.q_rank, self.num_groups * self.rank, self.num_groups * self.rank

    @property
    def b_sizes(self) -> tuple[int, int, int]:
        """Rows of B_q, B_k, B_v."""
        return self.q_rank * self.head_dim, self.rank * self.head_dim, self.rank * self.head_dim


def contract_factors(
    a_SBN: Tensor, b_SBN: Tensor, geometry: TPAGeometry, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [S, B, H, D], keys and values [S, B, G, D] from the outputs of the two factor projections.

    Args:
        a_SBN: [S, B, sum(a_sizes)].
        b_SBN: [S, B, sum(b_sizes)].
        geometry: the sizes.
        bias: [G·(P + 2)·D], of what comes out, in Megatron's mixed layout; None: none.
    """
    g = geometry
    a_q, a_kv = a_SBN.split([g.a_sizes[0], 2 * g.a_sizes[1]], dim=-1)
    b_q, b_kv = b_SBN.split([g.b_sizes[0], 2 * g.b_sizes[1]], dim=-1)
    bias_q = bias_kv = None
    if bias is not None:
        per_group = g.num_heads // g.num_groups
        bias_q, bias_kv = bias.view(g.num_groups, per_group + 2, g.head_dim).split([per_group, 2], dim=1)
        bias_kv = bias_kv.transpose(0, 1)
    a_q, b_q = a_q.unflatten(-1, (g.num_heads, g.q_rank)), b_q.unflatten(-1, (g.q_rank, g.head_dim))
    a_kv, b_kv = a_kv.unflatten(-1, (2, g.num_groups, g.rank)), b_kv.unflatten(-1, (2, g.rank, g.head_dim))
    query = cast(Tensor, _Contraction.apply(a_q, b_q, bias_q))
    key, value = cast(Tensor, _Contraction.apply(a_kv, b_kv, bias_kv)).unbind(2)
    return query, key, value


class _Contraction(Function):
    """a b / R + bias in one product; the division goes into it, and into those of the derivative."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """[S, B, .., N, D] of a [S, B, .., N, R] and b [S, B, .., R, D]; the bias is one token's."""
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
        if bias is not None:
            out.view(*a.shape[:2], *bias.shape).copy_(bias)
        a, b = a.flatten(0, -3), b.flatten(0, -3)
        ctx.save_for_backward(a, b)
        ctx.bias = None if bias is None else bias.shape
        _add_products(out.flatten(0, -3), a, b, 1 / a.shape[-1], beta=int(bias is not None))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        batch, of_one = grad.shape[:-2], grad.flatten(0, -3)
        grad_a = _add_products(torch.empty_like(a), of_one, b.mT, 1 / a.shape[-1])
        grad_b = _add_products(torch.empty_like(b), a.mT, of_one, 1 / a.shape[-1])
        grad_bias = None if ctx.bias is None else grad.flatten(2).sum((0, 1)).view(ctx.bias)
        return grad_a.view(*batch, *a.shape[1:]), grad_b.view(*batch, *b.shape[1:]), grad_bias


_LOOPED_BELOW, _FEW = 400, 4
"""A batched product of fewer multiplications a matrix is a plain loop of torch's on a CPU (aten's LinearAlgebra.cpp),
which takes up to four times as long as a few outer products one after the other."""


def _add_products(out: Tensor, left: Tensor, right: Tensor, alpha: float, *, beta: int = 0) -> Tensor:
    """beta out + alpha left right, in place, of batches of matrices; beta is 0 or 1."""
    (rows, few), columns = left.shape[-2:], right.shape[-1]
    if not (out.is_cpu and few <= _FEW and rows * few * columns < _LOOPED_BELOW):
        return out.baddbmm_(left, right, beta=beta, alpha=alpha)
    left = left * alpha
    if beta == 0:
        torch.mul(left[..., :1], right[..., :1, :], out=out)
    for k in range(1 - beta, few):
        out.addcmul_(left[..., k : k + 1], right[..., k : k + 1, :])
    return out


def factor_a_init(geometry: TPAGeometry, ranks: int = 1) -> Callable[[Tensor], Tensor]:
    """An initialiser of the A weight [sum(a_sizes), hidden] that gives the product a dense projection's variance.

    For inputs of unit mean square (the norm before attention sees to it) and independent factors,
    Var(A B / rank) = Var(A) · Var(B) / rank. B starts as a dense projection, so Var(A) = rank: a standard
    deviation of sqrt(rank / hidden), each section with its own rank.

    Args:
        geometry: of the whole projection.
        ranks: T; the rows are drawn in the order of T = 1 and left in that of the T parts, one after the other.
    """

    def initialise(weight: Tensor) -> Tensor:
        hidden = weight.shape[1]
        with torch.no_grad():
            for section, rank in zip(
                weight.split(geometry.a_sizes), (geometry.q_rank, geometry.rank, geometry.rank), strict=True
            ):
                section.normal_(0.0, math.sqrt(rank / hidden))
            parts = (section.chunk(ranks) for section in weight.split(geometry.a_sizes))
            weight.copy_(torch.cat([rows for part in zip(*parts, strict=True) for rows in part]))
        return weight

    return initialise


def section_rows(sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """The row ranges of consecutive sections of the given sizes: the logical matrices of a stacked weight."""
    ends = torch.tensor(sizes, device="cpu").cumsum(0).tolist()
    return tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))


def factor_a_sharding(local: ShardedTensor, geometry: TPAGeometry) -> ShardedTensorFactory:
    """The A weight or its bias as three global tensors, q, k and v: saved at one tensor-parallel size, loads at any.

    Args:
        local: this rank's tensor, sharded along its rows as if they were one section.
        geometry: of this rank's part.
    """
    assert local.axis_fragmentations is not None and local.data is not None
    axis, fragments = local.prepend_axis_num, local.axis_fragmentations
    part, ranks = local.global_offset[axis] // local.local_shape[0], fragments[axis]
    prepended = [(i, local.global_offset[i], fragments[i]) for i in range(axis)]

    def split(key: str, tensor: Tensor, replica_id: ReplicaId, _flattened_range: slice | None) -> Any:
        return [
            ShardedTensor.from_rank_offsets(
                f"{key}_{name}", rows, *prepended, (axis, part, ranks), replica_id=replica_id, prepend_axis_num=axis
            )
            for name, rows in zip("qkv", tensor.split(geometry.a_sizes), strict=True)
        ]

    def join(sections: Any) -> Tensor:
        return torch.cat(sections)

    return ShardedTensorFactory(local.key, local.data, split, join, local.replica_id)
