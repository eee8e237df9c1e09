"""GRPO and its relatives: a policy gradient over sampled answers, weighed by what is better than its group.

rho = exp(log p - log p_old), of a token (GRPO, arXiv 2402.03300) or the exponential of the mean over its answer (GSPO,
arXiv 2507.18071). A token's loss is -c min(rho A, clip(rho, 1 - low, 1 + high) A) + beta k3, or for CISPO (arXiv
2506.13585) -c sg(min(rho, 1 + high)) A log p + beta k3. c = min(p_old / p_sampled, clamp), without gradient, is the
importance weight of what the sampler's arithmetic makes of the same weights; k3 = exp(d) - d - 1, d = log p_ref -
log p. Normalisation, over the whole global batch: "token" (DAPO, arXiv 2503.14476), "sequence" (the mean of each answer
first) or "constant" (answers times the longest that can be sampled: Dr. GRPO, arXiv 2503.20783).

Log-probabilities are those of the policy that was sampled from: at the temperature of sampling.

Shapes: b rows, s positions, d documents of a row, n supervised tokens of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megatron_vpmoe.annotation import REFERENCE_LOG_P, Annotation
from megatron_vpmoe.data.batch import PADDING, Batch
from megatron_vpmoe.model.output.terms import at_places
from megatron_vpmoe.objectives.interface import Needs, Objective, ObjectiveResult

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.model.output import ModelOutput

SAMPLED = Annotation(name="sampled_log_p", dtype="float32")
"""Of each token, by the sampler: log p in the distribution that it was drawn from."""
OLD = Annotation(name="old_log_p", dtype="float32")
"""Of each token, by the trainer with the weights that sampled."""
ADVANTAGE = Annotation(name="advantage", dtype="float32", per="document")


@dataclass(frozen=True)
class GRPO(Objective):
    """The objective ``grpo``.

    Metrics, means over the supervised tokens of the global batch: ``loss/total`` (normalised as asked),
    ``policy/entropy`` (nats), ``policy/clip_share_{low,high}`` (tokens whose ratio is beyond a bound in the direction
    of their advantage; of CISPO above its one bound), ``policy/kl_old`` (rho - 1 - log rho of tokens: KL(old ||
    policy), since the old weights sampled), ``policy/sampler_gap`` (|log p_old - log p_sampled|),
    ``policy/clamped_share`` (tokens whose importance weight is clamped) and, with a reference,
    ``policy/kl_reference`` (k3); ``tokens/supervised`` and ``answers``.

    Attributes:
        normalisation: what the sum over tokens is divided by.
        ratio: of a token, or of its answer.
        surrogate: "clip" or "cispo".
        clip_low: how far a ratio may fall below 1.
        clip_high: how far it may rise above.
        kl: beta, the weight of k3 to a reference; 0: no reference is asked for, and one that is there only measured.
        mismatch_clamp: the largest importance weight; None: no such weight.
        longest: tokens that an answer may have.
        temperature: of sampling.
    """

    normalisation: Literal["token", "sequence", "constant"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clip", "cispo"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0
    mismatch_clamp: float | None = 2.0
    longest: int = 1
    temperature: float = 1.0

    @property
    def needs(self) -> Needs:
        """Samples with what is known of them; a reference where its weight is not 0."""
        log_p = (SAMPLED, OLD, REFERENCE_LOG_P) if self.kl else (SAMPLED, OLD)
        needed = (*(one.at(self.temperature) for one in log_p), ADVANTAGE)
        return Needs(annotations=needed, depends_on_weights=True)

    @classmethod
    def from_config(cls, cfg: RunConfig) -> GRPO:
        """With ``training.grpo_*``, for samples as the section ``rollouts`` says."""
        t, rollouts = cfg.training, cfg.rollouts
        return cls(
            normalisation=t.grpo_normalisation,
            ratio=t.grpo_ratio,
            surrogate=t.grpo_surrogate,
            clip_low=t.grpo_clip_low,
            clip_high=t.grpo_clip_high,
            kl=t.grpo_kl,
            mismatch_clamp=t.grpo_mismatch_clamp,
            longest=rollouts.rollout_max_new_tokens,
            temperature=rollouts.rollout_temperature,
        )

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """Supervised tokens, and answers that have any, in this rank's share of the global batch."""
        lengths = [_lengths(batch) for batch in batches]
        return {
            "tokens/supervised": sum(int(each.sum()) for each in lengths),
            "answers": sum(int((each > 0).sum()) for each in lengths),
        }

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """See ``Objective``; ``totals`` holds ``tokens/supervised`` and ``answers``."""
        places_N = batch.supervised
        log_p, entropy = output.log_probabilities(batch.labels, places_N, entropy=True, temperature=self.temperature)
        assert entropy is not None
        given = {name: at_places(values, places_N).to(log_p.dtype) for name, values in _per_token(batch).items()}
        lengths = _lengths(batch)
        old, advantage = given["old_log_p"], given["advantage"]

        log_ratio = log_p - old
        if self.ratio == "sequence":
            # Unsafe: not to ask the device whether the lengths add up to the tokens.
            means = torch.segment_reduce(log_ratio, "sum", lengths=lengths, unsafe=True) / lengths.clamp(min=1)
            log_ratio = means.repeat_interleave(lengths, output_size=len(log_p))
        ratio = log_ratio.exp()
        is_cispo, above = self.surrogate == "cispo", ratio > 1 + self.clip_high
        importance = (old - given["sampled_log_p"]).exp()
        correction = importance.clamp(max=self.mismatch_clamp) if self.mismatch_clamp else torch.ones_like(importance)
        losses = -correction * self._surrogate(ratio, advantage, log_p)
        share = 1.0 / max(totals["tokens/supervised"], 1.0)
        detached = log_p.detach()
        sums = {
            "policy/entropy": entropy.detach(),
            "policy/clip_share_low": (ratio < 1 - self.clip_low) & (advantage < 0) & (not is_cispo),
            "policy/clip_share_high": above & ((advantage > 0) | is_cispo),
            "policy/kl_old": _k3(detached - old),
            "policy/sampler_gap": (old - given["sampled_log_p"]).abs(),
            "policy/clamped_share": importance > (self.mismatch_clamp or torch.inf),
        }
        if REFERENCE_LOG_P.name in given:
            to_reference = _k3(given["reference_log_p"] - log_p)
            losses = losses + self.kl * to_reference
            sums["policy/kl_reference"] = to_reference.detach()
        # The sum over no tokens is a zero that hangs on the graph, so every rank takes part in the gradient exchange.
        loss = (losses * self._weights(lengths, totals, losses)).sum()
        metrics = {tag: values.to(losses.dtype).sum() * share for tag, values in sums.items()}
        return ObjectiveResult(loss, {"loss/total": loss.detach(), **metrics})

    def _surrogate(self, ratio: Tensor, advantage: Tensor, log_p: Tensor) -> Tensor:
        """[n]; what is to grow."""
        if self.surrogate == "cispo":
            return ratio.detach().clamp(max=1 + self.clip_high) * advantage * log_p
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return torch.minimum(ratio * advantage, clipped * advantage)

    def _weights(self, lengths: Tensor, totals: dict[str, float], like: Tensor) -> Tensor:
        """[n]; of each token in the loss."""
        answers = max(totals["answers"], 1.0)
        if self.normalisation == "sequence":
            of_answer = 1.0 / (answers * lengths.clamp(min=1).to(like.dtype))
            return of_answer.repeat_interleave(lengths, output_size=len(like))
        whole = answers * self.longest if self.normalisation == "constant" else max(totals["tokens/supervised"], 1.0)
        return torch.full_like(like, 1.0 / whole)


def _k3(difference: Tensor) -> Tensor:
    return torch.expm1(difference) - difference


def _per_token(batch: Batch) -> dict[str, Tensor]:
    """Annotations at each token, [b, s]."""
    of_document = {ADVANTAGE.name: batch.per_token(ADVANTAGE.name)}
    names = [one.name for one in (SAMPLED, OLD, REFERENCE_LOG_P) if one.name in batch.annotations]
    return {**of_document, **{name: batch.annotations[name] for name in names}}


def _lengths(batch: Batch) -> Tensor:
    """int64 [b * d]; supervised tokens of each document, in the order in which masked tokens follow each other."""
    documents = batch.annotations[ADVANTAGE.name].shape[1]
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device).unsqueeze(1) * documents
    counted = (batch.loss_mask & (batch.document_id != PADDING)).long()
    lengths = torch.zeros(len(batch.tokens) * documents, dtype=torch.int64, device=batch.tokens.device)
    return lengths.scatter_add_(0, (rows + batch.document_id.clamp(min=0)).flatten(), counted.flatten())
