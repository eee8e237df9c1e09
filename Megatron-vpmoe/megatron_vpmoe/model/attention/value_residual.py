"""The value residual: every layer mixes in the values of layer 1 (ResFormer, arXiv 2410.17897)."""

from __future__ import annotations

import torch
from torch import Tensor


def mix_first_value(value_SBGD: Tensor, first_value_SBGD: Tensor, scale: Tensor) -> Tensor:
    """λ · v + (1 - λ) · v_1, in the dtype of v; computed in fp32 or wider, since a bf16 λ cannot move away from 1.

    Args:
        value_SBGD: this layer's values [sequence, batch, KV group, head dim].
        first_value_SBGD: layer 1's values before any mixing, same shape.
        scale: λ, a scalar; 1.0 is exactly the identity for finite v_1.
    """
    wide = scale.to(torch.promote_types(value_SBGD.dtype, scale.dtype)).view(1)  # of a dimension: it decides the dtype
    return torch.addcmul(first_value_SBGD * (1 - wide), value_SBGD, wide).to(value_SBGD.dtype)
