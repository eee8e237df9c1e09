"""A dense projection as a tensor product whose A factors do not depend on the token.

A tensor-product layer computes head h as (1/R) Σ_r A[h, r] B[r]. With the weight of A zero and its bias constant this
is any projection whose heads' matrices span at most R: exact for R at least the number of heads, and otherwise the best
approximation in the Frobenius norm, by the singular vectors over heads.

Shapes: N heads (query heads or groups), R rank, D head dim, C hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def constant_factors(heads_NDC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [N, R] and B [R, D, C], in the dtype of the heads, with A B / R the projection or its best approximation.

    Where R exceeds N, the further rows of B repeat heads and their A is zero: they change nothing and can be learned.
    """
    count = heads_NDC.shape[0]
    if rank >= count:
        factor_a = heads_NDC.new_zeros(count, rank)
        factor_a[:, :count] = rank * torch.eye(count, dtype=heads_NDC.dtype)
        return factor_a, heads_NDC[torch.arange(rank) % count]
    flat = heads_NDC.flatten(1).double()
    # Ascending; the singular vectors over heads are the eigenvectors of the small Gram matrix.
    vectors = torch.linalg.eigh(flat @ flat.t()).eigenvectors[:, -rank:]
    factor_b = (vectors.t() @ flat).view(rank, *heads_NDC.shape[1:])
    return (rank * vectors).to(heads_NDC.dtype), factor_b.to(heads_NDC.dtype)


def relative_error(heads_NDC: Tensor, rank: int) -> float:
    """Frobenius norm of what a rank loses, relative to the projection's; 0.0 where it is exact."""
    if rank >= heads_NDC.shape[0]:
        return 0.0
    flat = heads_NDC.flatten(1).double()
    values = torch.linalg.eigvalsh(flat @ flat.t()).clamp(min=0)
    return float((values[:-rank].sum() / values.sum()).sqrt())
