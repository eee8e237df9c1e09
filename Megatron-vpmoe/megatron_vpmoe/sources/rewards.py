"""Rewards: functions of one sampled answer, by name or as ``module:function``; their weighted sum is what is learned.

A reward runs on rank 0 alone, and no two at once: samples may be scored on two threads. What it raises, or what is no
number of a usable size, ends the run with the sample named.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from megatron_vpmoe.config.schema_rollouts import RewardPart
from megatron_vpmoe.data.pieces import TokenPieces
from megatron_vpmoe.errors import ConfigError, DataError
from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.runtime.named import imported


@dataclass(frozen=True)
class Sample:
    """An answer to be scored.

    Attributes:
        prompt_ids: what was asked.
        ids: the answer, with what ended it.
        finished: whether it ended by itself and not at the limit.
        row: what stands with the prompt: of a prompt file its "row", of a dataset {"answer_ids": the stored answer}.
        manifest: of the dataset, for its vocabulary.
    """

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    finished: bool
    row: Mapping[str, Any]
    manifest: Manifest


Reward = Callable[[Sample], float]
_LARGEST = 1e6
"""Above it, weighed and squared, fp32 ends."""
_ONE_AT_A_TIME = threading.Lock()
_SHOWN = 600
"""Characters of each part of a sample in a message."""


def finished(sample: Sample) -> float:
    """1 where an answer ends by itself, else 0."""
    return float(sample.finished)


def stored_answer(sample: Sample) -> float:
    """1 where an answer is the stored one, token by token, else 0."""
    return float(list(sample.ids) == list(sample.row["answer_ids"]))


REWARDS: dict[str, Reward] = {"finished": finished, "stored_answer": stored_answer}


class Rewards:
    """The rewards of a run.

    Args:
        parts: at least one, no two of one name.

    Raises:
        ConfigError: one is unknown or cannot be imported.
    """

    def __init__(self, parts: Sequence[RewardPart]) -> None:
        self._parts = [(part.label, part.weight, _found(part.function)) for part in parts]

    def __call__(self, sample: Sample) -> dict[str, float]:
        """The number of each reward by name.

        Raises:
            DataError: a reward raises, or returns what is no number between -1e6 and 1e6.
        """
        return {name: self._one(name, reward, sample) for name, _, reward in self._parts}

    def total(self, scores: Mapping[str, float]) -> float:
        """The weighted sum."""
        return math.fsum(weight * scores[name] for name, weight, _ in self._parts)

    @staticmethod
    def _one(name: str, reward: Reward, sample: Sample) -> float:
        try:
            with _ONE_AT_A_TIME:
                value = reward(sample)
            # A text would be read as a number, a large one leave advantages infinite.
            if not isinstance(value, str | bytes) and abs(number := float(value)) <= _LARGEST:
                return number
            what, cause = f"returned {value!r}", None
        except (Exception, SystemExit) as error:  # of others' code: whatever it is, it is theirs to mend
            what, cause = f"failed with {type(error).__name__}: {error}", error
        raise DataError(
            f"the reward {name} {what}",
            source=f"the answer {_shown(sample.ids, sample)} to {_shown(sample.prompt_ids, sample)}, "
            f"row {_cut(repr(dict(sample.row)))}",
            remedy=f"a reward returns a number, of at most {_LARGEST:g} in size, whatever the model says",
        ) from cause


def _shown(ids: Sequence[int], sample: Sample) -> str:
    """Text and the ids that it came of; of a long one the beginning."""
    return f"{_cut(repr(TokenPieces.load(sample.manifest).decode(ids)))} = {len(ids)} ids {_cut(str(list(ids)))}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def _found(function: str) -> Reward:
    if function in REWARDS:
        return REWARDS[function]
    source = "rollouts.rewards"
    remedy = f"name one of {', '.join(REWARDS)}, or module:function in a module that Python finds (PYTHONPATH)"
    if ":" not in function:
        raise ConfigError(f"there is no reward {function}", source=source, remedy=remedy)
    found = imported(function, "reward", source=source, remedy=remedy)
    if not callable(found):
        raise ConfigError(f"{function} is no function: {found!r}", source=source, remedy=remedy)
    return cast(Reward, found)
