"""A sampling: who makes it, what it gave, and how a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from numpy.typing import NDArray

from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime.exchange import Exchange
from megatron_vpmoe.runtime.signals import Stop
from megatron_vpmoe.sources.groups import Rollout, columns, from_columns


@dataclass(frozen=True)
class Sampler:
    """What samples.

    Attributes:
        model: the bare model, whose weights nothing changes meanwhile.
        version: of its weights: steps after which they stood.
        stop: asked before each token and each reward.
        check: called before each forward pass; may raise.
        exchange: how its ranks tell each other what they have.
    """

    model: VPModel
    version: int = 0
    stop: Stop | None = None
    check: Callable[[], None] = lambda: None
    exchange: Exchange = field(default_factory=Exchange)


class Reached(NamedTuple):
    """Where in the run's order a sampling begins or ends.

    Attributes:
        drawn: prompts drawn until then.
        tokens: sampled until then.
    """

    drawn: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Sampling:
    """What one gave.

    Attributes:
        arrays: its answers, as ``groups.columns`` has them.
        rollouts: the same, whose arrays are stretches of ``arrays``.
        metrics: ``rollout/*``.
        reached: where it ended.
    """

    arrays: Mapping[str, NDArray[Any]]
    rollouts: list[Rollout]
    metrics: dict[str, float]
    reached: Reached

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], metrics: Mapping[str, float], reached: Reached) -> Self:
        """Of answers as they came."""
        arrays = columns(rollouts)
        return cls(arrays, from_columns(arrays), {f"rollout/{tag}": value for tag, value in metrics.items()}, reached)

    @classmethod
    def kept(cls, arrays: Mapping[str, NDArray[Any]], metrics: Mapping[str, Any], reached: Reached) -> Self | None:
        """Of what a checkpoint has; None where it has none.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is something else.
        """
        told = {tag: float(value) for tag, value in metrics.items()}
        return cls(arrays, from_columns(arrays), told, reached) if arrays else None

    def told(self) -> dict[str, float]:
        """Its metrics without the seconds: a position is the same on every rank, and after a resume."""
        return {tag: value for tag, value in self.metrics.items() if "seconds" not in tag}
