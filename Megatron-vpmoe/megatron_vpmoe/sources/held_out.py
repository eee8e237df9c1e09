"""Rewards on held-out prompts: the same sampling and the same rewards as in training, and nothing is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.sources.answers import Answering
from megatron_vpmoe.sources.prompts import Prompts
from megatron_vpmoe.sources.sampling import Sampler

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


class HeldOut:
    """One answer to each of the first ``eval_iters * global_batch_size`` held-out prompts, or all if there are fewer.

    They are sampled at the temperature of training, so that their rewards compare with those of rollouts. The draws are
    the same in each pass: what changes from one to the next is the weights'.

    Args:
        prompts: that are not trained on.
        manifest: of the training dataset.
        cfg: ``rollouts``, ``evaluation.eval_iters`` and ``training.global_batch_size``.
    """

    def __init__(self, prompts: Prompts, manifest: Manifest, cfg: RunConfig) -> None:
        self._prompts = prompts
        self._count = min(len(prompts), cfg.evaluation.eval_iters * cfg.training.global_batch_size)
        self._answering = Answering(manifest, cfg.rollouts)

    def measure(self, model: VPModel, stop: StopRequest | None = None) -> dict[str, float]:
        """What ``Answers.metrics`` has, such as ``reward_mean`` and ``reward/<name>``; a collective.

        Raises:
            Interrupted: a rank was asked to stop.
            DataError: a reward fails.
        """
        asked = [(number, self._prompts[number]) for number in range(self._count)]
        return self._answering(Sampler(model, stop=stop), asked, 1).metrics()
