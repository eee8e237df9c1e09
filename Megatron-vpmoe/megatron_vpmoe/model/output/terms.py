"""What is compared with a target, token by token: labels, or a teacher's probabilities of K ids.

Q = softmax(logits / temperature). Every loss here is a sum over buckets b, which are the K ids and perhaps the tail, of
a function of Q_b; with e_b = Q_b dL/dQ_b its gradient by a logit in bucket b is (e_b / Q_b - Σ e) Q_v / temperature.

Shapes: as in ``chunks``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from megatron_vpmoe.annotation import FILLING_LOG_P

Tail = Literal["bucket", "drop", "renormalise"]
LEAST_TAIL = 1e-12
"""A teacher's tail below this counts as this much: as none, and still a number that a student's can be held to."""


class OfIds(NamedTuple):
    """What a term sees of Q in a chunk.

    Attributes:
        log_q_nK: log-probabilities of its ids.
        gap_nK: by how much the largest logit of all exceeds theirs, over temperature.
        log_tail_n: log-probability of all other ids together; None where there is none, or it is not asked for.
    """

    log_q_nK: Tensor
    gap_nK: Tensor
    log_tail_n: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One loss a token, times a weight. All its tensors lie over the same tokens.

    Attributes:
        weight: of each token in the sum; takes no gradient.
        temperature: tau > 0.
    """

    weight: Tensor
    temperature: float = 1.0
    tells: ClassVar[int] = 1
    """Numbers a token, the loss first."""

    @property
    def has_tail(self) -> bool:
        """Whether the probability of what is not an id is asked for."""
        return False

    @abstractmethod
    def ids(self, rows: slice) -> Tensor:
        """int64 [n, K] of the whole vocabulary, no id twice in a row: those with a probability of their own."""

    @abstractmethod
    def read(self, rows: slice, q: OfIds) -> tuple[Tensor, Tensor, Tensor]:
        """What it tells, [``tells``, n]; the gradient of the weighted sum, for ``Distribution.gradient``."""

    def at(self, places_N: Tensor) -> Self:
        """Of a term over [B, S], the same for the tokens at N places of it in row-major order."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: at_places(value, places_N) for name, value in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Term):
    """-log Q[label].

    Attributes:
        labels: int64 [...], ids of the whole vocabulary.
    """

    labels: Tensor

    def ids(self, rows: slice) -> Tensor:
        return self.labels[rows].unsqueeze(-1)

    def read(self, rows: slice, q: OfIds) -> tuple[Tensor, Tensor, Tensor]:
        """At the label the gradient is weight · (exp(-loss) - 1) to full precision.

        Of a token that is nearly certain little more than rounding would be left otherwise.
        """
        loss, weight = -q.log_q_nK.squeeze(-1), self.weight[rows].to(q.log_q_nK.dtype)
        return loss.unsqueeze(0), weight, (weight * torch.expm1(-loss)).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class Divergence(Term):
    """A teacher's P against Q, by K ids and what is left of both: tau² KL or Jensen-Shannon.

    beta = 0: KL(P, Q); 1: KL(Q, P); between: beta KL(P, M) + (1 - beta) KL(Q, M), M = beta P + (1 - beta) Q
    (generalised Jensen-Shannon, arXiv 2306.13649, beta as TRL has it). Multiplied by temperature² as gradients of
    softmax(z / tau) shrink by it (arXiv 1503.02531). Beside the losses it tells log Q of the first id, and 1 where no
    other token is likelier, else 0.

    Attributes:
        teacher_ids: int32 or int64 [..., K], no id twice for one token.
        teacher_log_p: [..., K], log P of the ids, at the same temperature; FILLING_LOG_P or less: see there.
        beta: in [0, 1].
        tail: what becomes of the mass outside the ids. "bucket": one more outcome, all of it together; "drop": it is
            left out of the sum; "renormalise": P is scaled to sum to one over the ids, Q is not.
    """

    teacher_ids: Tensor
    teacher_log_p: Tensor
    beta: float = 0.0
    tail: Tail = "bucket"
    tells: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not (0 <= self.beta <= 1 and self.temperature > 0 and self.tail in ("bucket", "drop", "renormalise")):
            raise ValueError(f"a divergence of beta {self.beta}, tail {self.tail!r}, temperature {self.temperature}")

    @property
    def has_tail(self) -> bool:
        return self.tail == "bucket"

    def ids(self, rows: slice) -> Tensor:
        return self.teacher_ids[rows].long()

    def read(self, rows: slice, q: OfIds) -> tuple[Tensor, Tensor, Tensor]:
        log_q = q.log_q_nK
        log_p = self.teacher_log_p[rows].to(log_q.dtype).clamp(min=FILLING_LOG_P)
        # Over a whole vocabulary there is nothing else that such an id could belong to.
        is_whole = self.tail == "bucket" and q.log_tail_n is None
        own = (log_p > FILLING_LOG_P) | is_whole
        captured = log_p.masked_fill(~own, -math.inf).logsumexp(-1, keepdim=True)
        if self.tail == "renormalise":
            log_p = log_p - captured
        counts = own
        if q.log_tail_n is not None:
            # log(1 - exp(captured)): of rounding a sum may pass 1. What Q has outside is summed, not subtracted.
            left = torch.log(-torch.expm1(captured.clamp(max=-LEAST_TAIL)))
            outside = torch.cat([q.log_tail_n.unsqueeze(-1), log_q.masked_fill(own, -math.inf)], -1)
            log_p = torch.cat([log_p, left], -1)
            log_q = torch.cat([log_q, outside.logsumexp(-1, keepdim=True)], -1)
            counts = torch.cat([own, torch.ones_like(own[:, :1])], -1)
        each, e = (torch.where(counts, values, 0) for values in _terms(log_p, log_q, self.beta))
        tau, e_sum = self.temperature, e.sum(-1, keepdim=True)
        scale = tau * self.weight[rows].to(log_q.dtype).unsqueeze(-1)
        count = own.shape[-1]
        by_outside = -e_sum
        if q.log_tail_n is not None:
            by_outside = by_outside + e[:, count:] / log_q[:, count:].exp()
        q_of_ids = q.log_q_nK.exp()
        at_ids = torch.where(own, e[:, :count] - q_of_ids * e_sum, q_of_ids * by_outside)
        told = torch.stack([tau**2 * each.sum(-1), log_q[:, 0], (q.gap_nK[:, 0] == 0).to(log_q.dtype)])
        return told, (scale * by_outside).squeeze(-1), scale * at_ids


def _terms(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Each bucket's share of the divergence, and e = Q dL/dQ."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return p * (log_p - log_q), -p
    if beta == 1:
        ratio = log_q - log_p
        return q * ratio, q * (ratio + 1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    of_q = (1 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + of_q, of_q


def at_places(x_BS: Tensor, places_N: Tensor) -> Tensor:
    """[N, ...]: rows of [B, S, ...] at places in row-major order."""
    return x_BS.flatten(0, 1).index_select(0, places_N)
