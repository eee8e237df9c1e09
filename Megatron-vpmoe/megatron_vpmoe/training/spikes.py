"""Spikes of the loss: how far above those before it one is, in robust standard deviations."""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vpmoe.config.schema_failure import FailureSection

_NORMAL = 1.4826  # of a normal distribution, the standard deviation over the median absolute deviation
_LEAST = 1e-3  # nats, and of the median: losses that hardly differ make no spike of a rounding


class Spikes:
    """What a loss is held against: those of the finished steps before it, the same numbers on every rank.

    Args:
        cfg: of the run.

    Attributes:
        z: of the last loss that was looked at; 0 while there is too little to hold it against.
        acted: steps dropped and rollbacks so far.
        warned: spikes trained on of which a file tells.
        passed_over: [first, behind the last] consumed samples of each stretch that a rollback has left.
        returned_to: the checkpoint that the last rollback of this process went back to.
    """

    def __init__(self, cfg: FailureSection) -> None:
        self._cfg, self._losses = cfg, deque[float](maxlen=cfg.spike_window)
        self.z, self.acted, self.warned = 0.0, 0, 0
        self.passed_over: list[list[int]] = []
        self.returned_to: Path | None = None

    @property
    def found(self) -> bool:
        """Whether the last loss was a spike."""
        return self._cfg.spike_policy != "off" and self.z > self._cfg.spike_threshold

    def accepts(self, loss: float) -> bool:
        """Look at the loss of a step that has not moved the weights yet; whether it may."""
        self.z = self._z(loss) if len(self._losses) >= self._cfg.spike_history else 0.0
        return not self.found or self._cfg.spike_policy == "warn"

    def finished(self, loss: float) -> None:
        """A step has moved the weights."""
        self._losses.append(loss)

    def _z(self, loss: float) -> float:
        if not math.isfinite(loss):
            return 0.0
        center = statistics.median(self._losses)
        spread = _NORMAL * statistics.median(abs(each - center) for each in self._losses)
        return (loss - center) / max(spread, _LEAST * max(1.0, abs(center)))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-ready."""
        counts = {"acted": self.acted, "warned": self.warned}
        return {"losses": list(self._losses), **counts, "passed_over": self.passed_over}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave; a checkpoint from before there was any gives nothing."""
        self._losses.extend(map(float, state.get("losses", ())))
        self.acted, self.warned = int(state.get("acted", 0)), int(state.get("warned", 0))
        self.passed_over = list(state.get("passed_over", []))

    def back(self, state: dict[str, Any], passed_over: list[int]) -> None:
        """As ``state`` says, but for what was done since: a rollback."""
        acted, warned, stretches = self.acted, self.warned, [*self.passed_over, passed_over]
        self._losses.clear()
        self.restore(state)
        self.acted, self.warned, self.passed_over = acted, warned, stretches
