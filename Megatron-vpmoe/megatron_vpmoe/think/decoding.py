"""What a part leaves of the tokens before, to go on one token at a time: a row's state, and how it is handed on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from megatron_vpmoe.model.attention.masks import SequenceLayout

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Entry:
    """One tensor of a row's state.

    Attributes:
        shape: of one row, or, where it grows, of one position of it.
        dtype: of what is kept.
        grows: there is one for each position.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    grows: bool = False


def empty(entries: Mapping[K, Entry], rows: int, columns: int, device: torch.device) -> dict[K, Tensor]:
    """Of rows that are to begin [rows, *shape]; of growing entries [rows, columns, *shape]."""
    return {
        name: torch.zeros(rows, *([columns] if one.grows else []), *one.shape, dtype=one.dtype, device=device)
        for name, one in entries.items()
    }


@dataclass(frozen=True)
class Past:
    """What a forward pass over one packed row [1, S] leaves, to be continued document by document.

    Attributes:
        spans: the columns of each document, in order; padding is none.
        values: name of an entry -> [D, *shape], of each document behind its last token; or, where it grows,
            [S, *shape].
    """

    spans: tuple[slice, ...]
    values: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: SequenceLayout) -> Past:
        """For a pass with this layout; the host waits for the device once a layout."""
        return cls(layout.shared("spans", lambda: _spans(layout)))

    @property
    def ends(self) -> tuple[int, ...]:
        """The column of each document's last token."""
        return tuple(span.stop - 1 for span in self.spans)

    def put(self, name: str, value: Tensor) -> None:
        """Leave an entry."""
        self.values[name] = value


def _spans(layout: SequenceLayout) -> tuple[slice, ...]:
    if len(layout.document_id) != 1:
        raise ValueError(f"{len(layout.document_id)} rows; what is to be continued lies packed in one")
    document, spans, begin = layout.document_id[0].tolist(), [], 0
    for column in range(1, len(document) + 1):
        if column == len(document) or document[column] != document[begin]:
            spans += [slice(begin, column)] if document[begin] >= 0 else []
            begin = column
    return tuple(spans)
