"""What goes into the engine and what comes out: prompts and completions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

from megatron_vpmoe.errors import DataError, NonFiniteError
from megatron_vpmoe.generation.sampling import SamplingOptions


@dataclass(frozen=True)
class Prompt:
    """What to continue.

    Attributes:
        ids: token ids, at least one.
        identity: its draws come from this and the seed; None: a hash of the ids, so that equal prompts draw equally.
        max_new_tokens: at most so many, if fewer than the options allow.
        given: instead of samples, completions whose tokens are given, to learn how likely they are; at least a token
            each. The options must be greedy and without stop tokens, and all prompts have some or none.
    """

    ids: Sequence[int]
    identity: int | None = None
    max_new_tokens: int | None = None
    given: Sequence[Sequence[int]] = ()

    def identity_or_hash(self) -> int:
        """64 bits that are the same in every process."""
        if self.identity is not None:
            return self.identity
        digest = hashlib.sha256(b"".join(int(token).to_bytes(8, "little") for token in self.ids)).digest()
        return int.from_bytes(digest[:8], "little")


@dataclass
class Completion:
    """What came of a prompt; it grows while it is watched.

    Attributes:
        place: of the prompt among the prompts.
        sample: from 0.
        weight_version: as ``generate`` was told.
        ids: the new tokens, the stop token included where one was produced.
        as_sampled: of each token, log p in the distribution that was drawn from: after temperature, filters and
            grammar; 0 where greedy (-inf: greedily this given token would not have been chosen).
        untempered: of each token, the model's own log p.
        finish: "stop" at a stop token or where a grammar is complete, "length" at the limit or the end of the given;
            None while it grows.
        routing: where asked for, pieces [n, layers with experts * K] that together say to which experts the tokens of
            prompt and answer went, or [n, E] their weights of a mixture's experts, as ``replay.recording`` gives them;
            the last token is never computed.
    """

    place: int
    sample: int
    weight_version: int
    ids: list[int] = field(default_factory=list)
    as_sampled: list[float] = field(default_factory=list)
    untempered: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    routing: list[NDArray[Any]] = field(default_factory=list)

    def add(self, token: int, as_sampled: float, untempered: float) -> None:
        """The next token and its log-probabilities.

        Raises:
            NonFiniteError: the logits that it comes from hold a NaN.
        """
        if math.isnan(untempered):
            raise NonFiniteError(
                f"the logits of new token {len(self.ids)} hold a nan",
                source=f"prompt {self.place}",
                remedy="take an earlier checkpoint: the model has diverged",
            )
        self.ids.append(token)
        self.as_sampled.append(as_sampled)
        self.untempered.append(untempered)


def budgets_of(prompts: Sequence[Prompt], options: SamplingOptions, rows: int) -> list[list[int]]:
    """Of each prompt the tokens that each of its completions may have.

    Args:
        rows: completions that a rank decodes at once.

    Raises:
        DataError: no prompts, an empty one, limits with which nothing could be generated, or given completions of some.
    """
    if not prompts or any(len(prompt.ids) == 0 for prompt in prompts):
        raise DataError("an empty prompt", source="the prompts to continue", remedy="give every prompt a token")
    if len({bool(p.given) for p in prompts}) > 1 or (prompts[0].given and (options.temperature or options.stop_ids)):
        raise DataError("given completions among drawn ones", remedy="give all or none, greedy, without stop_ids")
    limit = options.max_new_tokens
    budgets = [
        [len(ids) for ids in p.given] if p.given else [min(limit, p.max_new_tokens or limit)] * options.samples
        for p in prompts
    ]
    shortest = min(map(min, budgets))
    if min(shortest, rows) < 1:
        raise DataError(f"limits {shortest} and {rows} rows", remedy="max_new_tokens and rows are at least 1")
    return budgets
