"""Rollouts by their rewards: answers scored against the others of their group.

A sampling draws prompts, n answers to each, and their rewards; groups of equal rewards make way for further prompts' a
few times, and fill up what is missing in the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.model.moe.replay import ROUTING, replaying
from megatron_vpmoe.sources.answers import Answers
from megatron_vpmoe.sources.groups import Advantage, Rollout, varies, with_advantages
from megatron_vpmoe.sources.prompts import Prompts, in_order
from megatron_vpmoe.sources.reference import log_p_of_labels
from megatron_vpmoe.sources.rollouts import Rollouts
from megatron_vpmoe.sources.sampling import Reached, Sampler, Sampling

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


class Rewarded(Rollouts):
    """See ``Rollouts``; of ``cfg`` also ``training.grpo_advantage``."""

    def __init__(self, prompts: Prompts, manifest: Manifest, cfg: RunConfig, dp_rank: int, dp_size: int) -> None:
        super().__init__(prompts, manifest, cfg, dp_rank, dp_size)
        self._advantage: Advantage = cfg.training.grpo_advantage
        self._size = cfg.rollouts.rollout_group_size

    def _sample(self, begin: Reached, by: Sampler) -> Sampling:
        """See ``Rollouts``; metrics are of everything that was sampled."""
        wanted, kept, spare, attempts = self._cfg.rollout_groups, [], [], 0
        drawn = begin.drawn
        every = Answers([], [])
        while len(kept) < wanted and attempts < self._cfg.rollout_attempts:
            asked = list(in_order(self._prompts, self._cfg.rollout_seed, drawn, wanted - len(kept)))
            answers = self._answering(by, asked, self._size)
            drawn += len(asked)
            attempts += 1
            every.add(answers)
            for first in range(0, len(answers.rollouts), self._size):
                group = answers.rollouts[first : first + self._size]
                (kept if varies(group) else spare).append(group)
        # What teaches nothing keeps the step's size, with advantages of 0.
        kept += spare[: wanted - len(kept)]
        kept.sort(key=lambda group: group[0].group)
        metrics = {
            **every.metrics(),
            "groups_without_variance": len(spare) * self._size / len(every.rollouts),
            "attempts": float(attempts),
        }
        whole = self._with_old([one for group in kept for one in with_advantages(group, self._advantage)], by)
        tokens = sum(len(one.ids) for one in every.rollouts)
        return Sampling.of(whole, metrics, Reached(drawn, begin.tokens + tokens))

    @torch.no_grad()
    def _with_old(self, rollouts: list[Rollout], by: Sampler) -> list[Rollout]:
        """With what the trainer's forward pass makes of the weights that sampled; a collective."""
        model = by.model
        was_training = model.training
        model.eval()
        mine: dict[int, Any] = {}
        try:
            for rows, numbers in self._shared_out(self._packed(rollouts)):
                # Also of answers that are not trained on.
                batch = self._batch([[rollouts[place].document() for place in places] for places in rows], numbers)
                by.check()
                with replaying(model, batch.annotations.get(ROUTING), batch.document_id):
                    log_p_BS = log_p_of_labels(model, batch, self._cfg.rollout_temperature).numpy()
                for row, places in enumerate(rows):
                    start = 0
                    for place in places:
                        span = rollouts[place].places
                        mine[place] = log_p_BS[row, start + span.start : start + span.stop].copy()
                        start += len(rollouts[place])
        finally:
            model.train(was_training)
        old = {place: values for part in by.exchange.gather(mine) for place, values in part.items()}
        return [replace(one, old_log_p=old[place]) for place, one in enumerate(rollouts)]
