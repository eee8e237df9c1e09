"""What goes into the engine and what comes out: prompts and completions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


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
    """

    place: int
    sample: int
    weight_version: int
    ids: list[int] = field(default_factory=list)
    as_sampled: list[float] = field(default_factory=list)
    untempered: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
