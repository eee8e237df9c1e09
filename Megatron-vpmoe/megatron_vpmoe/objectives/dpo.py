"""Direct preference optimisation: of two answers to a prompt, the chosen one is to gain on the rejected one.

With Delta = sum over an answer's tokens of log p - log p_ref, and m = Delta_chosen - Delta_rejected:

- ``sigmoid``: -log sigmoid(beta m), arXiv 2305.18290.
- ``ipo``: (m - 1 / (2 beta))², arXiv 2310.12036, which ends at a finite margin where preferences are deterministic.

Label smoothing e takes (1 - e) of the loss at m and e of that at -m. Length-normalised, Delta is a mean over the
answer's tokens instead of a sum. The loss is the mean over the pairs of the global batch, and where asked for the
chosen answers' cross-entropy a token is added (RPO, arXiv 2404.19733): a margin alone can grow while both fall.

Shapes: B rows, S positions, D documents of a row at most: 2i is chosen, 2i + 1 rejected (``data/pairs.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_vpmoe.annotation import REFERENCE_LOG_P
from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.model.output.terms import at_places
from megatron_vpmoe.objectives.interface import Needs, Objective, ObjectiveResult

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.model.output import ModelOutput

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class DPO(Objective):
    """The objective ``dpo``.

    Metrics, means over the pairs of the global batch unless said otherwise: ``loss/total``;
    ``rewards/{chosen,rejected}``, beta Delta, and ``rewards/margin``, their difference; ``accuracy/relative``, pairs
    with Delta_chosen > Delta_rejected, and ``accuracy/policy``, the same of log p alone; ``log_p/{chosen,rejected}``,
    an answer's log p (of its tokens' mean where length-normalised); ``loss/chosen``, the chosen answers'
    cross-entropy a token; ``kl/reference``, a mean over answer tokens of
    r - 1 - log r with r = p / p_ref, which estimates KL(reference || policy) as far as the answers are the
    reference's; ``tokens/{chosen,rejected}`` and ``pairs``, counts.

    Attributes:
        beta, label_smoothing, loss, length_normalised, chosen_weight: ``training.dpo_*``.
    """

    beta: float
    label_smoothing: float = 0.0
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    length_normalised: bool = False
    chosen_weight: float = 0.0

    @property
    def needs(self) -> Needs:
        """Pairs, and the reference's log-probabilities of their answers."""
        return Needs(annotations=(REFERENCE_LOG_P,), pairs=True)

    @classmethod
    def from_config(cls, cfg: RunConfig) -> DPO:
        """With ``training.dpo_*``."""
        t = cfg.training
        settings = (t.dpo_beta, t.dpo_label_smoothing, t.dpo_loss, t.dpo_length_normalised, t.dpo_chosen_weight)
        return cls(*settings)

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """Pairs, and supervised tokens of either side, in this rank's share of the global batch.

        Raises:
            DataError: a document has no partner in its row, or no supervised token.
        """
        pairs, tokens = 0, torch.zeros(2, dtype=torch.int64)
        for batch in batches:
            count_BD2 = _sums(batch.loss_mask.long(), _answers(batch)).unflatten(1, (-1, 2))
            documents = batch.document_id.max(dim=1).values + 1
            if not torch.equal((count_BD2 > 0).all(-1).sum(-1) * 2, documents.long()):
                raise DataError(
                    "a row holds a document without its partner, or an answer without a supervised token",
                    source=f"samples {batch.sample_ids}",
                    remedy="rebuild the dataset (vpmoe data build-pairs)",
                )
            pairs += int(documents.sum()) // 2
            tokens += count_BD2.sum((0, 1))
        return {"pairs": pairs, **{f"tokens/{side}": int(n) for side, n in zip(_SIDES, tokens, strict=True)}}

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        """See ``Objective``; ``totals`` holds ``pairs`` and ``tokens/{chosen,rejected}``."""
        places_N = batch.supervised
        log_p, _ = output.log_probabilities(batch.labels, places_N)
        apart = log_p - at_places(batch.annotations[REFERENCE_LOG_P.name], places_N)
        # Also without any supervised token it hangs on the graph: its rank takes part in the gradient exchange.
        empty_BS, answer_BDS = log_p.new_zeros(batch.labels.shape), _answers(batch)
        count_BD = _sums(batch.loss_mask.to(log_p.dtype), answer_BDS)
        divisor_BD = count_BD.clamp(min=1) if self.length_normalised else torch.ones_like(count_BD)
        delta_P2, alone_P2 = (
            (_sums(empty_BS.masked_scatter(batch.loss_mask, values), answer_BDS) / divisor_BD).view(-1, 2)
            for values in (apart, log_p.detach())
        )
        share_P = (count_BD.view(-1, 2)[:, 0] > 0) / max(totals["pairs"], 1.0)
        margin_P = delta_P2[:, 0] - delta_P2[:, 1]
        smooth = self.label_smoothing
        losses_P = (1 - smooth) * self._at(margin_P) + smooth * self._at(-margin_P)
        chosen = at_places(batch.document_id, places_N) % 2 == 0
        of_chosen = -(log_p * chosen).sum() / max(totals["tokens/chosen"], 1.0)
        loss = (losses_P * share_P).sum() + self.chosen_weight * of_chosen

        of_token = 1 / max(totals["tokens/chosen"] + totals["tokens/rejected"], 1.0)
        apart, reward_P2 = apart.detach(), self.beta * delta_P2.detach()
        metrics = {
            "loss/total": loss.detach(),
            "loss/chosen": of_chosen.detach(),
            "rewards/margin": (self.beta * margin_P.detach() * share_P).sum(),
            "accuracy/relative": ((margin_P.detach() > 0) * share_P).sum(),
            "accuracy/policy": ((alone_P2[:, 0] > alone_P2[:, 1]) * share_P).sum(),
            "kl/reference": (apart.expm1() - apart).sum() * of_token,
        }
        for side, name in enumerate(_SIDES):
            metrics[f"rewards/{name}"] = (reward_P2[:, side] * share_P).sum()
            metrics[f"log_p/{name}"] = (alone_P2[:, side] * share_P).sum()
        return ObjectiveResult(loss, metrics)

    def _at(self, margin_P: Tensor) -> Tensor:
        if self.loss == "ipo":
            return (margin_P - 1 / (2 * self.beta)).square()
        return -logsigmoid(self.beta * margin_P)


def _answers(batch: Batch) -> Tensor:
    """Bool [B, D, S], which positions are each document's, D even and at least 2."""
    most = max(batch.documents, 2)
    document_D1 = torch.arange(most + most % 2, device=batch.document_id.device).unsqueeze(-1)
    return batch.document_id.unsqueeze(1) == document_D1


def _sums(values_BS: Tensor, answer_BDS: Tensor) -> Tensor:
    """Sums over each document of a row, [B, D]; in one order, so that they are repeatable."""
    return torch.where(answer_BDS, values_BS.unsqueeze(1), 0).sum(-1)
