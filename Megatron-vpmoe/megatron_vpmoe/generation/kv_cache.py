"""The keys and values of past tokens, for rows that begin, grow and end independently of each other.

Keys are stored as attention reads them: normed and rotated. Values are stored mixed with the value residual. Dense keys
and values are stored for tensor-product layers too: at rank 2 with 2 groups the factors would take more room, not less.

A global layer keeps position p in column p, a layer with a window W in column p mod W: a ring whose columns are what
the window sees, in any order. All grow by blocks, up to W and without end. One column before the first is zero: the
softmax sink attends to it, a score that is the bias alone and a value of nothing.

Memory: 2 · layers · rows · groups · (1 + columns) · head dim · bytes, columns at most W in a local layer, and in a
global one the positions of the longest row, rounded up to a block; while a layer grows, that layer twice.

Shapes: R rows, G KV groups, C columns, D head dim, S positions of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Past = Mapping[int, tuple[Tensor, Tensor]]
"""Of each layer (global number, from 1) keys and values [G, S, D] of the first positions of a row."""

BLOCK = 128
"""Columns by which layers grow."""


class KVCache:
    """Keys and values of up to ``rows`` rows.

    Args:
        windows: of each layer (global number, from 1) its window, None for a global one.
        rows: R.
        groups: G of this rank.
        head_dim: D.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self,
        windows: Mapping[int, int | None],
        *,
        rows: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._windows = windows
        self._capacity = 0
        empty = torch.zeros(rows, groups, 2, 1, head_dim, dtype=dtype, device=device)
        self._stored = dict.fromkeys(windows, empty)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(x.nbytes for x in self._stored.values())

    def reserve(self, positions: int) -> None:
        """Make room for positions 0 to ``positions - 1`` of every row."""
        if positions <= self._capacity:
            return
        self._capacity = -(-positions // BLOCK) * BLOCK
        for number, window in self._windows.items():
            columns = columns_of(self._capacity, window)
            self._stored[number] = _grown(self._stored[number], 1 + columns)

    def layer(self, number: int) -> Tensor:
        """Keys and values [R, G, 2, 1 + C, D] of a layer, to be read and written; what is before the first is zero."""
        return self._stored[number]

    def width(self, window: int | None) -> int:
        """1 + C of the layers with that window."""
        return 1 + columns_of(self._capacity, window)

    def fill(self, row: int, past: Past) -> None:
        """Begin a row with the keys and values of its first positions, or with as many of the last as a window sees."""
        for number, pair in past.items():
            window = self._windows[number]
            stored, length = self._stored[number][row], pair[0].shape[1]
            begin = 0 if window is None else max(0, length - window)
            column = 1 + torch.arange(begin, length, device=stored.device) % (window or length)
            stored.index_copy_(2, column, torch.stack([x_GSD[:, begin:] for x_GSD in pair], 1))

    def move(self, source: int, target: int) -> None:
        """Let row ``target`` go on as row ``source`` has come so far."""
        for stored in self._stored.values():
            stored[target] = stored[source]


def of_documents(computed: Past, spans: Sequence[slice]) -> list[Past]:
    """Of keys and values [1, G, S, D] of a packed row those of each document, which lies in its columns."""
    return [
        {number: (key[0, :, span], value[0, :, span]) for number, (key, value) in computed.items()} for span in spans
    ]


def columns_of(positions: int, window: int | None) -> int:
    """Columns that so many positions take."""
    return positions if window is None else min(positions, window)


def _grown(x: Tensor, columns: int) -> Tensor:
    if x.shape[3] == columns:
        return x
    grown = x.new_zeros(*x.shape[:3], columns, x.shape[4])
    grown[:, :, :, : x.shape[3]] = x
    return grown
