"""How fast tokens come."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_vpmoe.generation.prompts import Completion
    from megatron_vpmoe.model.gpt import VPModel


@dataclass
class Pace:
    """When an answer was asked for, and when each of its tokens came, in seconds of one clock."""

    began: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """A token has come."""
        self.times.append(time.perf_counter())

    @property
    def tokens(self) -> int:
        """That came."""
        return len(self.times)

    @property
    def prefill_seconds(self) -> float:
        """Until the first token; 0 where none came."""
        return self.times[0] - self.began if self.times else 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first one; None where there are none."""
        seconds = self.times[-1] - self.times[0] if self.times else 0.0
        return (self.tokens - 1) / seconds if seconds > 0 else None


def continued(
    model: VPModel, ids: Sequence[int], new_tokens: int, stop_ids: Sequence[int], *, cached: bool
) -> tuple[Completion, Pace]:
    """Continue one text greedily, and tell how fast.

    Args:
        model: bare.
        ids: the text.
        new_tokens: at most so many.
        stop_ids: tokens that end it earlier.
        cached: with the KV cache; if not, each token is a pass over the whole text.
    """
    from megatron_vpmoe.generation.engine import generate
    from megatron_vpmoe.generation.prompts import Prompt
    from megatron_vpmoe.generation.sampling import SamplingOptions

    options = SamplingOptions(stop_ids=tuple(stop_ids), temperature=0.0, max_new_tokens=new_tokens)
    pace = Pace()
    (done,) = generate(model, [Prompt(ids)], options, watch=lambda _: pace.tick(), cached=cached)
    return done, pace
