"""Distillation from the K likeliest tokens of a teacher, mixed with cross-entropy.

At a position with a record the loss is alpha KD + (1 - alpha) CE, at one without it CE alone; each counts by its
span's weight over the span's supervised tokens of the global batch, as in ``span_ce``. KD is the divergence of
``model/output/terms.py``, where the formulas stand; arXiv 1503.02531 and, for what lies between the two directions of
KL, arXiv 2306.13649.

Shapes: b rows, s positions, n supervised tokens of the micro-batch, K ids a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_vpmoe.annotation import TEACHER_IDS, TEACHER_LOG_P, of_teacher
from megatron_vpmoe.data.batch import Batch, Span
from megatron_vpmoe.model.output import CrossEntropy, Divergence
from megatron_vpmoe.model.output.terms import Tail, at_places
from megatron_vpmoe.objectives.interface import Needs, Objective, ObjectiveResult
from megatron_vpmoe.objectives.span_ce import SpanCE, means_by_span

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.model.output import ModelOutput

_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}


@dataclass(frozen=True)
class TopKKD(Objective):
    """The objective ``topk_kd``.

    Metrics: those of ``span_ce``, of which ``loss/{analysis,final}`` are cross-entropies; per span
    ``kd/{analysis,final}``, the mean divergence over the positions with a record, times temperature². Means over all
    such positions: ``teacher/captured_mass``, the probability that the K ids have together; ``teacher/entropy``, in
    nats, what they leave being one outcome; ``teacher/agreement``, the share where no token is likelier to the student
    than the teacher's first choice; ``teacher/first_choice_p``, the student's probability of it (all of them at the
    temperature). ``recorded/{analysis,final}`` and ``tokens/without_record`` are counts.

    Attributes:
        cross_entropy: with the spans' weights.
        alpha: of KD; 0 measures it and trains by cross-entropy.
        beta: 0 forward KL, 1 reverse KL, between them Jensen-Shannon.
        top_k: ids a token; of a record with more the likeliest.
        temperature: of both softmaxes, and that of the record.
        tail: see ``Divergence``.
    """

    cross_entropy: SpanCE
    alpha: float = 0.5
    beta: float = 0.0
    top_k: int = 64
    temperature: float = 1.0
    tail: Tail = "bucket"

    @property
    def needs(self) -> Needs:
        """Records of at least ``top_k`` ids at the temperature. Another one cannot be derived: the tail is a sum."""
        ids, log_p, _ = of_teacher(self.top_k, self.temperature)
        return Needs(annotations=(ids, log_p))

    @classmethod
    def from_config(cls, cfg: RunConfig) -> TopKKD:
        """With ``training.kd_*``."""
        t = cfg.training
        beta = _BETA.get(t.kd_divergence, t.kd_beta)
        return cls(SpanCE.from_config(cfg), t.kd_alpha, beta, t.kd_top_k, t.kd_temperature, t.kd_tail)

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """Supervised tokens of each span, and those with a record, in this rank's share of the global batch.

        Raises:
            DataError: a supervised token belongs to neither span.
        """
        counts = self.cross_entropy.counts(batches)
        for span in (Span.ANALYSIS, Span.FINAL):
            chosen = [_recorded(batch) & batch.loss_mask & (batch.span_id == span) for batch in batches]
            counts[f"recorded/{span.name.lower()}"] = sum(int(each.sum()) for each in chosen)
        return counts

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """See ``Objective``; ``totals`` holds ``{tokens,recorded}/{analysis,final}``."""
        places_N, recorded = batch.supervised, _recorded(batch)
        ids, log_p = (batch.annotations[each.name][..., : self.top_k] for each in (TEACHER_IDS, TEACHER_LOG_P))
        weight = self.cross_entropy.weight_of_each(batch, totals)
        of_kd = self.alpha * recorded
        any_ids = torch.arange(self.top_k, dtype=ids.dtype, device=ids.device)
        divergence = Divergence(
            # Where there is no record any ids will do, as long as they differ: they weigh nothing.
            teacher_ids=torch.where(recorded.unsqueeze(-1), ids, any_ids),
            teacher_log_p=log_p,
            weight=weight * of_kd,
            temperature=self.temperature,
            beta=self.beta,
            tail=self.tail,
        )
        terms = [divergence, CrossEntropy(labels=batch.labels, weight=weight * (1 - of_kd))]
        loss, ((kd, log_q_of_first, agrees), (ce,)) = output.weighted_sum(places_N, terms)

        seen, p = at_places(recorded, places_N), at_places(log_p, places_N).exp()
        captured = p.sum(-1)
        of_record = {
            "captured_mass": captured,
            "entropy": torch.special.entr(p).sum(-1) + torch.special.entr((1 - captured).clamp(min=0)),
            "agreement": agrees,
            "first_choice_p": log_q_of_first.exp(),
        }
        share = 1 / max(totals["recorded/analysis"] + totals["recorded/final"], 1.0)
        metrics = {f"teacher/{name}": torch.where(seen, each, 0).sum() * share for name, each in of_record.items()}
        metrics |= means_by_span("kd", torch.where(seen, kd, 0), batch, totals, "recorded")
        metrics |= means_by_span("loss", ce, batch, totals)
        return ObjectiveResult(loss, {"loss/total": loss.detach(), **metrics})

    def summary(self, totals: dict[str, float]) -> dict[str, float]:
        """That of ``span_ce``; ``recorded/*`` and ``tokens/without_record`` of the global batch."""
        recorded = {name: totals[name] for name in ("recorded/analysis", "recorded/final")}
        without = totals["tokens/analysis"] + totals["tokens/final"] - sum(recorded.values())
        return {**self.cross_entropy.summary(totals), **recorded, "tokens/without_record": without}


def _recorded(batch: Batch) -> Tensor:
    """Bool [b, s], where the teacher was asked; all over the padding, where nothing is supervised."""
    return batch.annotations[TEACHER_IDS.name][..., 0] >= 0
