"""Rows being read from somewhere, one by one, and the place to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

Row = Mapping[str, Any]


class RowStream(Protocol):
    """``(place, row)`` in a fixed order; ``place`` names file and row for messages."""

    def __iter__(self) -> Iterator[tuple[str, Row]]: ...

    def cursor(self) -> dict[str, Any]:
        """Where another stream of the same source would go on, JSON; to be called between two rows."""
        ...
