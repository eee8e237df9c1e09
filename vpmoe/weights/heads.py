"""Query, key and value matrices head by head, out of Megatron's mixed layout and back.

Shapes: H heads, G groups, D head dim, C hidden.
"""

from __future__ import annotations

from torch import Tensor

from megatron_vpmoe.model.attention.mixed_qkv import mixed_qkv_rows, split_mixed_qkv


def split_heads(mixed: Tensor, num_heads: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the mixed layout [(H + 2 G) D, C] -> queries [H, D, C], keys and values [G, D, C]."""
    parts = split_mixed_qkv(mixed.t(), num_heads, num_groups)  # [C, heads, D]
    query, key, value = (part.permute(1, 2, 0) for part in parts)
    return query, key, value


def join_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The inverse of ``split_heads``."""
    parts = (query, key, value)
    mixed = query.new_empty(sum(part.shape[0] * part.shape[1] for part in parts), query.shape[2])
    for part, rows in zip(parts, mixed_qkv_rows(len(query), len(key), query.shape[1]), strict=True):
        mixed[rows] = part.flatten(0, 1)
    return mixed
