"""What was retrieved for the chunks of a row, as arrays: where it was found and how is not the model's concern.

Shapes: B rows, S positions, G chunks of a row, K entries a chunk at most, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """Entries that the positions of a chunk may read.

    Attributes:
        entries_BGKH: vectors; what is beyond a chunk's count is zero.
        count_BG: int64, how many there are of each chunk.
        chunk_BS: int64, the chunk of each position; one that is none of 0 to G - 1 has nothing to read.
    """

    entries_BGKH: Tensor
    count_BG: Tensor
    chunk_BS: Tensor

    def visible(self) -> Tensor:
        """Bool [B, S, G K]: which entries a position may read."""
        chunks, entries = self.entries_BGKH.shape[1:3]
        own_BSG = self.chunk_BS.unsqueeze(-1) == torch.arange(chunks, device=self.chunk_BS.device)
        there_BGK = torch.arange(entries, device=self.count_BG.device) < self.count_BG.unsqueeze(-1)
        return (own_BSG.unsqueeze(-1) & there_BGK.unsqueeze(1)).flatten(2)
