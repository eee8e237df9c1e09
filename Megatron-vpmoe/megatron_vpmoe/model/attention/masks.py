"""Which key a query may see: packed documents, causality and the sliding window, as masks that layers share.

Shapes: B batch, S sequence, H heads, N blocks, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The documents packed into each row, and what follows from them.

    A query at row i sees a key at row j iff both have the same document id and j <= i, and, in a layer with a window,
    i - j < window (the window counts the query itself). Padding has document id -1 and sees only padding.

    Masks are computed once and kept with the layout, so that the layers of one pass share them.

    Attributes:
        document_id: int32 [B, S]; the rows of one document are contiguous.
        position: int64 [B, S]; counts from 0 in each document.
        recurs: many batches have this shape, as in training: a kernel may be compiled for it.
        rows_on_host: tokens and document ids as they came from the host, for what is looked up there: a device would
            have to be waited for. None: they did not.
    """

    document_id: Tensor
    position: Tensor
    recurs: bool = False
    rows_on_host: tuple[Tensor, Tensor] | None = None
    _shared: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.document_id.dim() != 2 or self.document_id.shape != self.position.shape:
            raise ValueError(
                "document_id and position must both be [batch, sequence], "
                f"not {list(self.document_id.shape)} and {list(self.position.shape)}"
            )

    @property
    def length(self) -> int:
        """S."""
        return self.document_id.shape[1]

    def shared(self, key: object, make: Callable[[], T]) -> T:
        """The value kept under ``key``, made on first use without recording gradients."""
        if key not in self._shared:
            with torch.no_grad():
                self._shared[key] = make()
        return self._shared[key]  # type: ignore[return-value]

    def position_in(self, dtype: torch.dtype) -> Tensor:
        """``position`` in a floating dtype."""
        return self.shared(("position", dtype), lambda: self.position.to(dtype))

    def visible(self, window: int | None) -> Tensor:
        """Bool [B, 1, S, S]: True where the query may see the key."""
        return self.shared(("visible", window), lambda: self._visible(window))

    def _visible(self, window: int | None) -> Tensor:
        distance = self.distance()
        near = distance >= 0
        if window is not None:
            near &= distance < window
        same = self.document_id[:, :, None] == self.document_id[:, None, :]
        return (same & near).unsqueeze(1)

    def distance(self) -> Tensor:
        """int64 [S, S]: i - j, the query's row minus the key's; within one document, the distance in it."""
        row = torch.arange(self.length, device=self.document_id.device)
        return row[:, None] - row

    def blocks_visible(self, window: int) -> Tensor:
        """Bool [B, N, W, 2W] for N = ceil(S / W) blocks of W queries against the W keys before and their own W keys.

        Rows that fill up the last block belong to a document of their own, so every row sees at least itself.
        """
        return self.shared(("blocks_visible", window), lambda: self._blocks_visible(window))

    def _blocks_visible(self, window: int) -> Tensor:
        batch, filler = self.document_id.shape[0], -self.length % window
        query = torch.nn.functional.pad(self.document_id, (0, filler), value=-2).view(batch, -1, window)
        before = torch.nn.functional.pad(query[:, :-1], (0, 0, 1, 0), value=-3)
        key = torch.cat([before, query], dim=-1)
        row = torch.arange(2 * window, device=key.device)
        distance = row[window:, None] - row
        return (query[..., None] == key[..., None, :]) & (distance >= 0) & (distance < window)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device, least: int = 0) -> tuple[Tensor, SequenceLayout]:
    """Token ids as one batch, right-aligned: int64 [B, S] (padding 0) and its layout; S is at least ``least``.

    The padding is a document of its own, so no real token sees it and every row's positions start at 0.
    """
    longest = max(least, *(len(row) for row in rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    document_id = torch.full((len(rows), longest), -1, dtype=torch.int32)
    position = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        start = longest - len(row)
        tokens[number, start:] = torch.tensor(list(row))
        document_id[number, start:] = 0
        position[number, start:] = torch.arange(len(row))
    return tokens.to(device), SequenceLayout(document_id=document_id.to(device), position=position.to(device))


def additive(visible: Tensor) -> Tensor:
    """fp32, of the shape of ``visible``: 0 where visible, -inf elsewhere, to be added to scores."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
