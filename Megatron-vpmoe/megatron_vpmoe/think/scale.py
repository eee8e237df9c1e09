"""The channels of an embedding: their means and deviations in the whole table.

Shapes: V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scale(NamedTuple):
    """Mean and deviation of each channel, [H], fp32 or wider."""

    mean_H: Tensor
    deviation_H: Tensor

    @classmethod
    def of(cls, table_VH: Tensor) -> Scale:
        """Of a table."""
        wide_VH = table_VH.to(torch.promote_types(table_VH.dtype, torch.float32))
        deviation_H, mean_H = torch.std_mean(wide_VH, 0, correction=0)
        return cls(mean_H, deviation_H)

    def standardised(self, embedded: Tensor) -> Tensor:
        """Embeddings [..., H], each channel less its mean and over its deviation, in their dtype."""
        return ((embedded.to(self.mean_H.dtype) - self.mean_H) / self.deviation_H).to(embedded.dtype)

    def moved(self, embedded: Tensor, by: Tensor) -> Tensor:
        """Embeddings moved by a difference of standardised ones, in their dtype; by none not in a bit."""
        return embedded + (by * self.deviation_H).to(embedded.dtype)
