"""One query a row over keys and values that decoding has kept.

Shapes: B rows, C columns, N query heads, G heads of keys and values, P = N / G query heads of each, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """Keys and values of a row each and where its query stands: ``attended``, of any query."""

    stored_BC2GD: Tensor
    position_B: Tensor

    def __call__(self, query_BN1D: Tensor) -> Tensor:
        return attended(*self, query_BN1D)


def store(stored_BC2GD: Tensor, position_B: Tensor, kept_B2GD: Tensor) -> None:
    """Write a new token's keys and values in the column of its position."""
    stored_BC2GD[torch.arange(position_B.shape[0], device=position_B.device), position_B] = kept_B2GD


def attended(stored_BC2GD: Tensor, position_B: Tensor, query_BN1D: Tensor) -> Tensor:
    """[B, N, 1, D]: softmax attention to the columns up to the position; scores and softmax are fp32 or wider.

    Columns behind it hold what another row has left there.
    """
    wide = torch.promote_types(query_BN1D.dtype, torch.float32)
    key_BGCD, value_BGCD = stored_BC2GD.to(wide).permute(2, 0, 3, 1, 4)
    query_BGPD = query_BN1D.to(wide).squeeze(2).unflatten(1, (key_BGCD.shape[1], -1))
    column = torch.arange(key_BGCD.shape[2], device=position_B.device)
    behind_B11C = (column > position_B.unsqueeze(1))[:, None, None]
    score = (query_BGPD @ key_BGCD.mT) * query_BN1D.shape[-1] ** -0.5
    taken_BGPD = torch.softmax(score.masked_fill(behind_B11C, -torch.inf), -1) @ value_BGCD
    return taken_BGPD.flatten(1, 2).unsqueeze(2).to(query_BN1D.dtype)
