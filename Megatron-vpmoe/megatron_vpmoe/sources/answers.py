"""Answers of a model to prompts, sampled and scored: what rollouts are, and what is measured on held-out prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron_vpmoe.config.schema_rollouts import RolloutsSection
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.runtime import pulse
from megatron_vpmoe.runtime.signals import Interrupted
from megatron_vpmoe.sources.form import Form, repetition
from megatron_vpmoe.sources.groups import Rollout
from megatron_vpmoe.sources.prompts import Asked
from megatron_vpmoe.sources.rewards import Rewards, Sample
from megatron_vpmoe.sources.sampling import Sampler
from megatron_vpmoe.turns import generation_ends

_SECONDS_OF_SCORING = 10.0


@dataclass
class Answers:
    """Some answers, and what they cost.

    Attributes:
        rollouts: those to the first prompt, to the second, ...; without advantages.
        scores: the numbers of each by the names of the rewards.
        valid: whether each is valid Harmony; empty where the vocabulary has none.
        sampling: seconds.
        scoring: seconds.
    """

    rollouts: list[Rollout]
    scores: list[dict[str, float]]
    valid: list[bool] = field(default_factory=list)
    sampling: float = 0.0
    scoring: float = 0.0

    def add(self, other: Answers) -> None:
        """Take in those of ``other``."""
        self.rollouts += other.rollouts
        self.scores += other.scores
        self.valid += other.valid
        self.sampling += other.sampling
        self.scoring += other.scoring

    def metrics(self) -> dict[str, float]:
        """Of all: rewards where there are any, lengths in tokens, the shares cut off, said again and valid, seconds."""
        lengths, rewards = [len(one.ids) for one in self.rollouts], [one.reward for one in self.rollouts]
        of_rewards = {"reward_mean": float(np.mean(rewards)), "reward_std": float(np.std(rewards))}
        return {
            **(of_rewards if self.scores[0] else {}),
            **{f"reward/{name}": float(np.mean([each[name] for each in self.scores])) for name in self.scores[0]},
            "length_mean": float(np.mean(lengths)),
            "length_max": float(max(lengths)),
            "truncated_share": float(np.mean([not one.finished for one in self.rollouts])),
            "repetition": float(np.mean([repetition(one.ids.tolist()) for one in self.rollouts])),
            **({"valid_share": float(np.mean(self.valid))} if self.valid else {}),
            "seconds_sampling": self.sampling,
            "seconds_scoring": self.scoring,
        }


class Answering:
    """Asks a model.

    Args:
        manifest: of the training dataset: its vocabulary says what ends an answer.
        cfg: rewards, and how to sample.
        record_routing: note which experts their tokens went to.

    Raises:
        ConfigError: a reward cannot be had.
    """

    def __init__(self, manifest: Manifest, cfg: RolloutsSection, *, record_routing: bool = False) -> None:
        self._manifest, self._rewards, self._record_routing = manifest, Rewards(cfg.rewards or []), record_routing
        ends = {*generation_ends(manifest.tokenizer.special_tokens).values(), manifest.tokenizer.eod_id}
        self._options = SamplingOptions(
            cfg.rollout_max_new_tokens,
            tuple(sorted(ends)),
            temperature=cfg.rollout_temperature,
            seed=cfg.rollout_seed,
        )
        self._form = Form.of(manifest)

    def __call__(self, by: Sampler, asked: Sequence[tuple[int, Asked]], samples: int) -> Answers:
        """A collective.

        Args:
            by: what is asked.
            asked: the number of each prompt, which its draws come from, and the prompt.
            samples: answers to each.

        Raises:
            Interrupted: a rank was asked to stop.
            DataError: a reward fails; on every rank.
        """
        began, stop = time.perf_counter(), by.stop
        completions = generate(
            by.model,
            [Prompt(one.ids, identity=number) for number, one in asked],
            replace(self._options, samples=samples),
            weight_version=by.version,
            stop=None if stop is None else stop.is_requested,
            record_routing=self._record_routing,
            exchange=by.exchange,
        )
        if stop is not None and stop.agreed():
            raise Interrupted
        sampled = time.perf_counter()
        rollouts = [Rollout.of(each, asked[each.place][1].ids, asked[each.place][0]) for each in completions]

        def score(first: int) -> list[dict[str, float]]:
            found, end = [], time.monotonic() + _SECONDS_OF_SCORING
            for one, each in zip(rollouts[first:], completions[first:], strict=True):
                if (stop is not None and stop.is_requested()) or (found and time.monotonic() > end):
                    break
                found.append(self._rewards(self._sample(one, asked[each.place][1].row)))
            return found

        scores: list[dict[str, float]] = []
        while len(scores) < len(rollouts):
            # Piece by piece: no rank waits for all rewards within one collective, showing no sign of life.
            piece = by.exchange.from_rank_0(partial(score, len(scores)))
            pulse.beat()
            if not piece:
                raise Interrupted
            scores += piece
        rewards = [self._rewards.total(each) for each in scores]
        scored = [replace(one, reward=reward) for one, reward in zip(rollouts, rewards, strict=True)]
        form = self._form
        valid = [form(one.prompt_ids.tolist(), one.ids.tolist()).valid for one in rollouts] if form else []
        return Answers(scored, scores, valid, sampled - began, time.perf_counter() - sampled)

    def _sample(self, one: Rollout, row: dict[str, Any]) -> Sample:
        # Rewards may keep or change what they are given: neither the next one nor a later sampling sees it.
        ids = tuple(one.prompt_ids.tolist()), tuple(one.ids.tolist())
        return Sample(*ids, one.finished, MappingProxyType(deepcopy(row)), self._manifest)
