"""Who scores: a teacher is asked about conversations in its own ids, and says its K likeliest successors of a token.

Shapes: S tokens of a conversation, N positions of it, K ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.teacher_records import Records
from vpmoe.tokenizer import Tokenizer


class Conversation(NamedTuple):
    """What a teacher is asked about.

    Attributes:
        tokens: int64 [S].
        positions: int64 [N], ascending, below S - 1: the successors of these tokens are asked for.
        labels: int64 [N], whose log-probability is asked for as well.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """What is asked of every position.

    Attributes:
        count: K.
        temperature: that the logits are divided by.
        among: int64, ascending, at least K: the teacher's ids that an answer may name. Probabilities are over its whole
            vocabulary all the same: what the others have is the tail's.
    """

    count: int
    temperature: float
    among: NDArray[np.int64]


class Answer(NamedTuple):
    """Of all positions of a conversation.

    Attributes:
        records: in the teacher's ids.
        lost: fp32 [N]; of the teacher's own K likeliest, the probability of those that the question does not admit.
    """

    records: Records
    lost: NDArray[np.float32]


class Scorer(Protocol):
    """A teacher at work."""

    def score(self, conversations: Iterable[Conversation]) -> Iterator[list[Answer]]:
        """A list for each batch of conversations, in their order.

        What lies in a batch follows from where its first conversation stands. The tail's mass of a record is what its
        log-probabilities leave of 1.

        Raises:
            VpmoeError: the teacher cannot, or says what cannot be.
        """
        ...


class Teacher(Protocol):
    """A teacher that has been found; nothing heavy is loaded before it is opened.

    Attributes:
        identity: JSON-able, what decides its numbers: hash of the weights, or name and settings of who serves it.
        told: JSON-able, what a manifest says of it besides, such as names.
        tokenizer: its vocabulary; None where only probes can tell.
    """

    identity: dict[str, Any]
    told: dict[str, Any]
    tokenizer: Tokenizer | None

    def open(self, question: Question, student: Tokenizer | None) -> AbstractContextManager[Scorer]:
        """Ready to answer ``question``; ``student`` is the vocabulary of the dataset, for probes of a server."""
        ...


def batches(
    conversations: Iterable[Conversation], tokens: int, *, padded: bool = False
) -> Iterator[Sequence[Conversation]]:
    """Neighbours that hold at most ``tokens`` tokens together, or one that holds more.

    Args:
        conversations: any.
        tokens: of a batch.
        padded: each counts as long as the longest.
    """
    held: list[Conversation] = []
    used = longest = 0
    for conversation in conversations:
        size = len(conversation.tokens)
        longest = max(longest, size)
        if held and (longest * (len(held) + 1) if padded else used + size) > tokens:
            yield held
            held, used, longest = [], 0, size
        held.append(conversation)
        used += size
    if held:
        yield held
