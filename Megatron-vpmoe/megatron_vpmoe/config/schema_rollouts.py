"""The section of sampled answers: how they are made, scored and watched."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from megatron_vpmoe.config.schema_section import (
    BOUND,
    Few,
    Fraction,
    PositiveFloat,
    Section,
    Seed,
    Several,
    Size,
    Text,
    within,
)


def _is_function(value: str) -> str:
    if not re.fullmatch(r"[a-z_]+|[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise PydanticCustomError(BOUND, "must be the name of a reward, or module:function")
    return value


class RewardPart(Section):
    """One reward function."""

    function: Annotated[Text, AfterValidator(_is_function)]
    """Name, or "module:function": takes a megatron_vpmoe.sources.rewards.Sample and returns a number."""
    weight: Annotated[float, within(-1e6, 1e6, "it weighs quantities of order 1")] = 1.0
    """What its number is multiplied by in the sum of rewards."""

    @property
    def label(self) -> str:
        """What metrics call it."""
        return self.function.rpartition(":")[2]


MODES = ("low", "medium", "high")
"""Reasoning modes, as Harmony's system message names them."""


class CurriculumPart(Section):
    """A stretch of a curriculum: shares of prompts by the reasoning mode that student and teacher are asked in."""

    from_share: Annotated[float, within(0, 1, "nothing is left of the curriculum there")]
    """Of curriculum_tokens; it is in force until the next one's."""
    low: Annotated[float, within(0, 1, "it is a share")] = 0.0
    """Share of prompts in the mode low."""
    medium: Annotated[float, within(0, 1, "it is a share")] = 0.0
    """Share of prompts in the mode medium."""
    high: Annotated[float, within(0, 1, "it is a share")] = 0.0
    """Share of prompts in the mode high."""
    rollouts: Few = 1
    """Answers to each prompt."""


class RolloutsSection(Section):
    """Sampling answers of the model that is trained, and scoring them."""

    rewards: Several[RewardPart] | None = None
    """Reward functions, as a list of {function, weight}. Of on_policy they are only measured; of all else null samples
    nothing."""
    rollout_prompts: Text | None = None
    """JSONL of {"ids": token ids, "row": what rewards read}, its first line may be {"vocabulary": identity}; null: the
    prompts of the training dataset."""
    rollout_valid_prompts: Text | None = None
    """The same of held-out prompts, whose rewards are validation; null: the prompts of the validation split."""
    rollout_groups: Size = 8
    """Prompts of a sampling; each gives a group of answers."""
    rollout_group_size: Few = 8
    """Answers to each prompt; of grpo two at least, since an advantage is relative to the others of the group."""
    curriculum: Several[CurriculumPart] | None = None
    """Of on_policy: reasoning modes of prompts and answers to each by sampled tokens, as a list of {from_share, low,
    medium, high, rollouts}, for prompts of a file that knows these modes; null: as they stand, rollout_group_size each.
    """
    curriculum_tokens: Annotated[int, within(1, 10**15, "no run samples that many")] | None = None
    """Of a curriculum: sampled tokens that from_share is a share of."""
    rollout_attempts: Few = 1
    """Of grpo: samplings at most until every group has answers of different rewards; 1: groups without variance stay.
    """
    rollout_epochs: Few = 1
    """How often the answers of a sampling are trained on; a step takes global_batch_size of them."""
    rollout_staleness: Annotated[int, within(0, 1024, "a sampling that far from its weights is of another model")] = 0
    """Updates before its first use that a sampling begins, with the weights as they then are, on a thread beside the
    updates; 0: in between, with the weights that it is used on."""
    rollout_max_new_tokens: Size = 256
    """Longest answer, in tokens."""
    rollout_temperature: Annotated[float, within(1e-6, 1e6, "logits divided by it are all alike")] = 1.0
    """Logits are divided by it, in sampling and in the update."""
    rollout_seed: Seed = 1234
    """Seed of the draws and of the order of prompts."""
    mask_truncated: bool = False
    """Do not train on answers that were cut off at rollout_max_new_tokens; their rewards count in the group."""
    router_replay: Literal["off", "replay"] = "off"
    """Experts in the update: "replay" sends each token where it went when it was sampled, "off" where the router now
    would."""
    collapse: Literal["warn", "stop"] = "warn"
    """What becomes of a sampling beyond one of the bounds below: a line in the log, or the end of the run before it is
    trained on."""
    collapse_length: PositiveFloat | None = None
    """Largest mean length of a sampling's answers, in tokens; null: any."""
    collapse_repetition: Fraction | None = None
    """Largest share of an answer's stretches of four tokens that it has had before, on average; null: any."""
    collapse_validity: Fraction | None = None
    """Least share of answers in valid Harmony; null: any."""
