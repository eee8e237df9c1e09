"""Inputs that several attention tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vpmoe.model.attention.masks import SequenceLayout


def packed_layout(*rows: list[int]) -> SequenceLayout:
    """One row per argument: the lengths of its documents in order; a negative length is padding of that length."""
    ids, positions = [], []
    for lengths in rows:
        document, row_ids, row_positions = 0, [], []
        for length in lengths:
            row_ids += [-1 if length < 0 else document] * abs(length)
            row_positions += [0] * -length if length < 0 else list(range(length))
            document += length > 0
        ids.append(row_ids)
        positions.append(row_positions)
    return SequenceLayout(torch.tensor(ids, dtype=torch.int32), torch.tensor(positions))


def random_qkv(
    layout: SequenceLayout,
    *,
    heads: int = 4,
    groups: int = 2,
    dim: int = 8,
    queries: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [B, H, Q, D], keys and values [B, G, S, D] and sinks [H], all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    batch, keys = layout.document_id.shape
    queries = keys if queries is None else queries

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    return (
        draw(batch, heads, queries, dim),
        draw(batch, groups, keys, dim),
        draw(batch, groups, keys, dim),
        draw(heads).detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
    )
