"""Weighted sums over tokens of what is compared with a target: labels, or a teacher's probabilities of K ids.

The target is there before the logits are, so the gradients are made while a chunk's logits exist: nothing is kept for
the backward pass but the gradients of hidden states and projection, and nothing is computed twice: three matrix
products, as without chunks. It takes the weight of each token beforehand, since the projection's gradient sums over
tokens; the backward pass then only multiplies by the gradient of the one number that came out.

Q = softmax(logits / temperature). Every loss here is a sum over buckets b, which are the K ids and perhaps the tail, of
a function of Q_b; with e_b = Q_b dL/dQ_b its gradient by a logit in bucket b is (e_b / Q_b - Σ e) Q_v / temperature.

Shapes: as in ``chunks``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.output.chunks import Distribution, main_grad, over_chunks, wide_dtype

Tail = Literal["bucket", "drop", "renormalise"]
LEAST_TAIL = 1e-12
"""A teacher's tail below this counts as this much: as none, and still a number that a student's can be held to."""
_LEAST_LOG = -100.0


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One loss a token, times a weight. All its tensors lie over the same tokens.

    Attributes:
        weight: of each token in the sum; takes no gradient.
        temperature: tau > 0.
    """

    weight: Tensor
    temperature: float = 1.0

    @property
    def has_tail(self) -> bool:
        """Whether the probability of what is not an id is asked for."""
        return False

    @abstractmethod
    def ids(self, rows: slice) -> Tensor:
        """int64 [n, K] of the whole vocabulary, no id twice in a row: those with a probability of their own."""

    @abstractmethod
    def read(self, rows: slice, q: Distribution) -> tuple[Tensor, Tensor, Tensor]:
        """The losses [n]; the gradient of their weighted sum by the logits, for ``Distribution.gradient``."""

    def where(self, mask: Tensor) -> Self:
        """The same for the tokens where the mask holds."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value[mask] for name, value in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Term):
    """-log Q[label].

    Attributes:
        labels: int64 [...], ids of the whole vocabulary.
    """

    labels: Tensor

    def ids(self, rows: slice) -> Tensor:
        return self.labels[rows].unsqueeze(-1)

    def read(self, rows: slice, q: Distribution) -> tuple[Tensor, Tensor, Tensor]:
        """At the label the gradient is weight · (exp(-loss) - 1) to full precision.

        Of a token that is nearly certain little more than rounding would be left otherwise.
        """
        loss, weight = -q.log_q_nK.squeeze(-1), self.weight[rows].to(q.log_q_nK.dtype)
        return loss, weight, (weight * torch.expm1(-loss)).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class Divergence(Term):
    """A teacher's P against Q, by K ids and what is left of both: tau² KL or Jensen-Shannon.

    beta = 0: KL(P, Q); 1: KL(Q, P); between: beta KL(P, M) + (1 - beta) KL(Q, M), M = beta P + (1 - beta) Q
    (generalised Jensen-Shannon, arXiv 2306.13649, beta as TRL has it). Multiplied by temperature² as gradients of
    softmax(z / tau) shrink by it (arXiv 1503.02531).

    Attributes:
        teacher_ids: int64 [..., K], no id twice for one token.
        teacher_log_p: [..., K], log P of the ids, at the same temperature.
        beta: in [0, 1].
        tail: what becomes of the mass outside the ids. "bucket": one more outcome, all of it together; "drop": it is
            left out of the sum; "renormalise": P is scaled to sum to one over the ids, Q is not.
    """

    teacher_ids: Tensor
    teacher_log_p: Tensor
    beta: float = 0.0
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        if not (0 <= self.beta <= 1 and self.temperature > 0 and self.tail in ("bucket", "drop", "renormalise")):
            raise ValueError(f"a divergence of beta {self.beta}, tail {self.tail!r}, temperature {self.temperature}")

    @property
    def has_tail(self) -> bool:
        return self.tail == "bucket"

    def ids(self, rows: slice) -> Tensor:
        return self.teacher_ids[rows]

    def read(self, rows: slice, q: Distribution) -> tuple[Tensor, Tensor, Tensor]:
        log_q = q.log_q_nK
        log_p = self.teacher_log_p[rows].to(log_q.dtype).clamp(min=_LEAST_LOG)
        captured = log_p.logsumexp(-1, keepdim=True)
        if self.tail == "renormalise":
            log_p = log_p - captured
        if q.log_tail_n is not None:
            # log(1 - exp(captured)): of rounding a sum may pass 1. What Q has outside is summed, not subtracted.
            left = torch.log(-torch.expm1(captured.clamp(max=-LEAST_TAIL)))
            log_p = torch.cat([log_p, left], -1)
            log_q = torch.cat([log_q, q.log_tail_n.unsqueeze(-1)], -1)
        each, e = _terms(log_p, log_q, self.beta)
        tau, e_sum = self.temperature, e.sum(-1, keepdim=True)
        scale = tau * self.weight[rows].to(log_q.dtype).unsqueeze(-1)
        count = q.log_q_nK.shape[-1]
        at_ids = e[:, :count] - log_q[:, :count].exp() * e_sum
        outside = -e_sum
        if q.log_tail_n is not None:
            outside = outside + e[:, count:] / log_q[:, count:].exp()
        return tau**2 * each.sum(-1), (scale * outside).squeeze(-1), scale * at_ids


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


def weighted_sum(
    hidden_NH: Tensor, projection_VH: Tensor, terms: Sequence[Term], tp_group: dist.ProcessGroup | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The sum over terms and tokens of weight · loss, and each term's losses without weights.

    Memory beyond inputs and gradients: the logits of a chunk in the dtype of the hidden states and, for each term,
    their probabilities in fp32, together CHUNK_BYTES. The projection's gradient takes 4 bytes an element from here to
    the backward pass and is rounded once, or where the projection has a ``main_grad`` not at all. Under tensor
    parallelism the gradient of the hidden states is this rank's part of a sum over ranks; the caller places the
    operation that sums it.

    Args:
        hidden_NH: hidden states, any floating dtype; the same on all tensor-parallel ranks.
        projection_VH: the output projection, or this rank's rows of it (rank r has r·V to (r + 1)·V - 1).
        terms: over the N tokens.
        tp_group: the ranks that split the vocabulary.

    Returns:
        the weighted sum, 0-d and differentiable once, and each term's losses [N] without gradient; fp32 or wider.
    """
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden_NH, projection_VH))
    total, *losses = _WeightedSum.apply(hidden_NH, projection_VH, terms, tp_group, wanted)
    return total, losses


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, projection, terms, tp_group, wanted):  # type: ignore[override]
        wide = wide_dtype(hidden)
        losses = [hidden.new_empty(len(hidden), dtype=wide) for _ in terms]

        def read(rows: slice, logits_nV: Tensor, buffers: list[Tensor]) -> Tensor | None:
            summed = None
            for term, loss, buffer in zip(terms, losses, buffers, strict=True):
                ids, tau = term.ids(rows), term.temperature
                q = Distribution.of(logits_nV, buffer, ids, tp_group, temperature=tau, tail=term.has_tail)
                loss[rows], *gradient = term.read(rows, q)
                if any(wanted):
                    made = q.gradient(*gradient)
                    summed = made if summed is None else summed.add_(made)
            return summed

        ctx.gradients = over_chunks(hidden, projection, read, wanted, buffers=len(terms))
        ctx.projection = projection
        ctx.mark_non_differentiable(*losses)
        sums = [(loss * term.weight.to(wide)).sum() for term, loss in zip(terms, losses, strict=True)]
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum(), *losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the gradient of weighted_sum can be taken once: it has been handed out")
        (grad_hidden, grad_projection), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad)
        if grad_projection is not None:
            grad_projection.mul_(grad)
            if (buffer := main_grad(ctx.projection)) is not None:
                buffer.add_(grad_projection)
                grad_projection = torch.zeros_like(ctx.projection)
            grad_projection = grad_projection.to(ctx.projection.dtype)
        return grad_hidden, grad_projection, None, None, None
