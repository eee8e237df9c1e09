"""Megatron's mixed layout of a query-key-value projection: group after group its queries, its key, its value.

A run of groups is contiguous, so a tensor-parallel rank's part of the rows has the same layout with fewer groups.

Shapes: H query heads, G KV groups, P = H / G heads a group, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_mixed_qkv(qkv: Tensor, num_heads: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [..., H, D], keys and values [..., G, D] from Megatron's mixed layout [..., G·(P + 2)·D].

    For each group the layout holds its P = H / G queries, then its key, then its value.
    """
    per_group = num_heads // num_groups
    mixed = qkv.unflatten(-1, (num_groups, per_group + 2, -1))
    query, key, value = mixed.split([per_group, 1, 1], dim=-2)
    return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)


def mixed_qkv_rows(num_heads: int, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """int64 row indices of the query, key and value matrices in a weight of Megatron's mixed layout."""
    rows = torch.arange((num_heads + 2 * num_groups) * head_dim, device="cpu")
    query, key, value = split_mixed_qkv(rows, num_heads, num_groups)
    return query.flatten(), key.flatten(), value.flatten()
