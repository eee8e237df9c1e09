"""Where in a step what runs belongs: to a pass, and to a part of the model.

Only forward passes are marked by part (``runtime.ranges``). Autograd numbers its nodes as it makes them, so that a
derivative is of the part that was open when its node was made.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch

PASSES = ("forward", "backward", "communication", "optimizer")
"""The outermost ranges; what is outside is of the pass "other", what is recomputed for the backward pass of "again"."""

_next_number: Callable[[], int] = vars(torch._C)["_autograd"]._get_sequence_nr


class Ranges:
    """A listener of ``runtime.ranges``.

    Attributes:
        is_again: whether what runs is only run again, for its derivative.
    """

    def __init__(self) -> None:
        self.is_again: Callable[[], bool] = lambda: False
        self._open: list[str] = []
        self._begin: list[int] = []  # autograd's number when a part begins or goes on
        self._parts: list[str] = []

    def enter(self, name: str) -> None:
        """See ``RangeListener``."""
        self._open.append(name)
        self._mark()

    def leave(self, name: str) -> None:
        """See ``RangeListener``."""
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        self._begin.append(_next_number())
        self._parts.append(self._open[-1] if self._open else "other")

    @property
    def of_pass(self) -> str:
        """The pass that runs."""
        return "again" if self.is_again() else next((name for name in self._open if name in PASSES), "other")

    @property
    def part(self) -> str:
        """The innermost range; backward, that of the operation whose derivative runs, or "gradients" where they are
        handed over.
        """
        inner = self._open[-1] if self._open else "other"
        if inner != "backward":
            return inner
        if self.is_again():
            return "forward"
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return inner
        place = bisect.bisect(self._begin, node._sequence_nr()) - 1
        return self._parts[place] if 0 <= place < len(self._parts) - 1 else "gradients"
