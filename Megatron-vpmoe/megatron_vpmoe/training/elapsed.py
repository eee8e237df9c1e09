"""How far a run is besides its steps: real tokens trained on, and seconds; axes that curves of runs share."""

from __future__ import annotations

import math
import time
from typing import Any

TOKENS = "elapsed/tokens"
SECONDS = "elapsed/seconds"


class Elapsed:
    """Counts on from where the checkpoint was that a run continues; what was done again counts once.

    Args:
        tokens: real tokens of all ranks, trained on before.
        seconds: before; since the run was open, with validation, samples and saving.

    Attributes:
        tokens: so far.
    """

    def __init__(self, tokens: float = 0.0, seconds: float = 0.0) -> None:
        self.tokens, self._before, self._began = tokens, seconds, time.monotonic()

    @classmethod
    def since(cls, place: Any) -> Elapsed | None:
        """From what ``place`` gave when the checkpoint was saved; None where it says no such thing."""
        given = [place.get(tag) for tag in (TOKENS, SECONDS)] if isinstance(place, dict) else []
        found = [value for value in given if isinstance(value, int | float) and math.isfinite(value) and value >= 0]
        return cls(*found) if len(found) == 2 else None

    def place(self) -> dict[str, float]:
        """The two as metrics."""
        return {TOKENS: self.tokens, SECONDS: round(self._before + time.monotonic() - self._began, 3)}
