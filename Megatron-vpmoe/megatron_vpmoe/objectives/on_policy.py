"""On-policy distillation: the student writes, a teacher says of each token how likely it was; beside it an anchor.

Of the N supervised tokens of the global batch some were sampled, the others are of stored conversations (the anchor).
With p the student, q the teacher, s the student as it sampled, all at the temperature of sampling, a sampled token
costs

"sampled": -sg(w a) log p, with the advantage a = -(log p - log q) and the importance weight w = min(p / s, clamp), both
without gradient: in expectation the gradient of KL(p, q) at what precedes the token (arXiv 2306.08543, 2306.13649). Its
value is told as -w a, the estimate of that divergence, which falls as the student learns; the gradient is the same.
"topk": that KL itself, over the teacher's K likeliest ids and their tail as one outcome (``model/output/terms.py``).

A token of the anchor costs -log p at temperature 1. The loss is the sum over all of them, divided by N.

Shapes: b rows, s positions, d documents of a row, m sampled tokens of the micro-batch, K ids a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megatron_vpmoe.annotation import IS_SAMPLED, TEACHER_IDS, TEACHER_LABEL_LOG_P, TEACHER_LOG_P, of_teacher
from megatron_vpmoe.data.batch import Batch, Span
from megatron_vpmoe.model.output import CrossEntropy, Divergence
from megatron_vpmoe.model.output.terms import at_places
from megatron_vpmoe.objectives.grpo import SAMPLED
from megatron_vpmoe.objectives.interface import Needs, Objective, ObjectiveResult

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.model.output import ModelOutput

_SPANS = {"analysis": Span.ANALYSIS, "final": Span.FINAL}


@dataclass(frozen=True)
class OnPolicy(Objective):
    """The objective ``on_policy``.

    Metrics: ``loss/total``; ``loss/policy``, the mean cost of a sampled token; ``loss/anchor``, the mean cross-entropy
    of the anchor, where there is one; ``gap/{analysis,final,total}``, the mean of log p - log q over the sampled tokens
    of a span, and of all; ``policy/sampler_gap`` (|log p - log s|). Of "sampled" ``policy/clamped_share`` (tokens whose
    importance weight is clamped); of "topk" ``teacher/captured_mass``, ``teacher/agreement`` (the share where no token
    is likelier to the student than the teacher's first choice). ``tokens/{sampled,anchor}``, ``sampled/{analysis,
    final}`` are counts, ``anchor/share`` follows from them.

    Attributes:
        loss: of a sampled token.
        clamp: the largest importance weight; None: any.
        top_k: K of "topk"; of a record with more the likeliest.
        temperature: of sampling.
    """

    loss: Literal["sampled", "topk"] = "sampled"
    clamp: float | None = 2.0
    top_k: int = 64
    temperature: float = 1.0

    @property
    def needs(self) -> Needs:
        """Samples, and what a teacher says of them."""
        by_ids = of_teacher(self.top_k, self.temperature)
        asked = by_ids if self.loss == "topk" else (TEACHER_LABEL_LOG_P.at(self.temperature),)
        needed = (SAMPLED.at(self.temperature), IS_SAMPLED, *asked)
        return Needs(annotations=needed, depends_on_weights=True)

    @classmethod
    def from_config(cls, cfg: RunConfig) -> OnPolicy:
        """With ``training.opd_*`` and ``kd_top_k``, for samples as the section ``rollouts`` says."""
        t = cfg.training
        return cls(t.opd_loss, t.opd_clamp, t.kd_top_k, cfg.rollouts.rollout_temperature)

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """Sampled tokens, those of each span and those of the anchor, in this rank's share of the global batch."""
        counts = dict.fromkeys(("tokens/sampled", "tokens/anchor", *(f"sampled/{name}" for name in _SPANS)), 0)
        for batch in batches:
            counts["tokens/sampled"] += len(batch.sampled)
            counts["tokens/anchor"] += len(batch.anchor)
            for name, span in _SPANS.items():
                counts[f"sampled/{name}"] += int((at_places(batch.span_id, batch.sampled) == span).sum())
        return counts

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """See ``Objective``; ``totals`` holds the counts."""
        sampled_M = batch.sampled
        share = 1.0 / max(totals["tokens/sampled"] + totals["tokens/anchor"], 1.0)
        read = self._by_teachers_ids if self.loss == "topk" else self._by_sampled_token
        loss, costs, log_p, more = read(output, batch, sampled_M, share)
        # A sum over no tokens is a zero that hangs on the graph, so every rank takes part in the gradient exchange.
        weight = torch.full_like(batch.labels, share, dtype=log_p.dtype)
        of_anchor, losses = output.cross_entropy(batch.labels, batch.anchor, weight)
        loss = loss + of_anchor

        gap = log_p - at_places(batch.annotations[TEACHER_LABEL_LOG_P.name], sampled_M).to(log_p.dtype)
        sampler_gap = (log_p - at_places(batch.annotations[SAMPLED.name], sampled_M).to(log_p.dtype)).abs()
        means = {"loss/policy": costs, "gap/total": gap, "policy/sampler_gap": sampler_gap, **more}
        of_all = max(totals["tokens/sampled"], 1.0)
        metrics = {tag: values.to(log_p.dtype).sum() / of_all for tag, values in means.items()}
        spans = at_places(batch.span_id, sampled_M)
        for name, span in _SPANS.items():
            metrics[f"gap/{name}"] = torch.where(spans == span, gap, 0).sum() / max(totals[f"sampled/{name}"], 1.0)
        if totals["tokens/anchor"]:
            metrics["loss/anchor"] = losses.sum() / totals["tokens/anchor"]
        return ObjectiveResult(loss, {"loss/total": loss.detach(), **metrics})

    def _by_sampled_token(
        self, output: ModelOutput, batch: Batch, sampled_M: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The part of the loss; its cost and log p of each sampled token, [m]; numbers to take the means of."""
        log_p, _ = output.log_probabilities(batch.labels, sampled_M, temperature=self.temperature)
        now = log_p.detach()
        of_teacher, as_sampled = (
            at_places(batch.annotations[one.name], sampled_M).to(now.dtype) for one in (TEACHER_LABEL_LOG_P, SAMPLED)
        )
        importance = (now - as_sampled).exp()
        clamp = torch.inf if self.clamp is None else self.clamp
        costs = importance.clamp(max=clamp) * (now - of_teacher)
        loss = (costs * (1 + log_p - now)).sum() * share
        return loss, costs, now, {"policy/clamped_share": importance > clamp}

    def _by_teachers_ids(
        self, output: ModelOutput, batch: Batch, sampled_M: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """As ``_by_sampled_token``."""
        ids, log_p = (batch.annotations[each.name][..., : self.top_k] for each in (TEACHER_IDS, TEACHER_LOG_P))
        squared = self.temperature**2  # what a divergence is multiplied by; here it is the policy's own temperature
        weight = torch.full(batch.labels.shape, share / squared, device=batch.labels.device)
        divergence = Divergence(
            teacher_ids=ids, teacher_log_p=log_p, weight=weight, temperature=self.temperature, beta=1.0
        )
        told_alone = CrossEntropy(labels=batch.labels, weight=torch.zeros_like(weight), temperature=self.temperature)
        loss, ((costs, _, agrees), (ce,)) = output.weighted_sum(sampled_M, [divergence, told_alone])
        captured = at_places(log_p, sampled_M).exp().sum(-1)
        return loss, costs / squared, -ce, {"teacher/captured_mass": captured, "teacher/agreement": agrees}

    def summary(self, totals: dict[str, float]) -> dict[str, float]:
        """The counts, and ``anchor/share``."""
        sampled, anchor = totals["tokens/sampled"], totals["tokens/anchor"]
        return {**totals, "anchor/share": anchor / max(sampled + anchor, 1.0)}
