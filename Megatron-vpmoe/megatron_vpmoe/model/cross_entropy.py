"""Cross-entropy over a large vocabulary: only the supervised positions, a bounded number of them at a time.

Shapes: N supervised positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# fp32 logits of one chunk: bounds the extra memory at any vocabulary size.
CHUNK_BYTES = 128 * 2**20


def chunked_cross_entropy(
    hidden_NH: Tensor, labels_N: Tensor, project: Callable[[Tensor], Tensor], vocab: int
) -> Tensor:
    """-log p(label) of every row.

    Rows go through the output projection in chunks whose fp32 logits take at most CHUNK_BYTES; with more than one chunk
    the logits are recomputed in the backward pass instead of kept.

    Args:
        hidden_NH: the final hidden states of the chosen positions, any floating dtype.
        labels_N: int64.
        project: hidden [n, H] -> logits [n, V].
        vocab: V, for sizing the chunks.

    Returns:
        fp32 [N].
    """

    def losses(hidden_nH: Tensor, labels_n: Tensor) -> Tensor:
        return functional.cross_entropy(project(hidden_nH).float(), labels_n, reduction="none")

    rows = max(1, CHUNK_BYTES // (4 * vocab))
    if hidden_NH.shape[0] <= rows:
        return losses(hidden_NH, labels_N)
    chunks = zip(hidden_NH.split(rows), labels_N.split(rows), strict=True)
    return torch.cat([checkpoint(losses, h, y, use_reentrant=False) for h, y in chunks])  # type: ignore[list-item]
