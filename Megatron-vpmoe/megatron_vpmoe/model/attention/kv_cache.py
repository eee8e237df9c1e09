"""The keys and values of past tokens, per layer, for decoding.

Keys are stored as attention reads them: normed and rotated. Values are stored mixed with the value residual. Dense keys
and values are stored for tensor-product layers too: at rank 2 with 2 groups the factors would take more room, not less.

Shapes: B batch, G KV groups, S tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one batch of rows that grow together."""

    def __init__(self) -> None:
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def append(
        self, layer_number: int, key_BGSD: Tensor, value_BGSD: Tensor, *, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens; returns those that the new tokens can see, new ones last.

        Args:
            layer_number: global, 1-based.
            key_BGSD: new keys.
            value_BGSD: new values.
            window: of a local layer. Only the last ``window - 1`` past tokens are kept, and returned, for it.
        """
        if layer_number in self._stored:
            past_key, past_value = self._stored[layer_number]
            key_BGSD = torch.cat([past_key, key_BGSD], dim=2)
            value_BGSD = torch.cat([past_value, value_BGSD], dim=2)
        if window is None:
            self._stored[layer_number] = key_BGSD, value_BGSD
        else:
            begin = max(0, key_BGSD.shape[2] - (window - 1))
            self._stored[layer_number] = key_BGSD[:, :, begin:], value_BGSD[:, :, begin:]
        return key_BGSD, value_BGSD
