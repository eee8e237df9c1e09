"""Weighted sums over tokens of terms, with their gradients made while a chunk's logits exist.

The target is there before the logits are: nothing is kept for the backward pass but the gradients of hidden states and
projection, and nothing is computed twice: three matrix products, as without chunks. It takes the weight of each token
beforehand, since the projection's gradient sums over tokens; the backward pass then only multiplies by the gradient of
the one number that came out. Terms of one temperature share one softmax.

Shapes: as in ``chunks``; M ids of all terms together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.output.chunks import Distribution, main_grad, over_chunks, wide_dtype
from megatron_vpmoe.model.output.terms import OfIds, Term


def weighted_sum(
    hidden_NH: Tensor, projection_VH: Tensor, terms: Sequence[Term], tp_group: dist.ProcessGroup | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The sum over terms and tokens of weight · loss, and what each term tells of each token.

    Memory beyond inputs and gradients: the logits of a chunk in the dtype of the hidden states and, for each
    temperature, their probabilities in fp32, together CHUNK_BYTES. The projection's gradient takes 4 bytes an element
    from here to the backward pass and is rounded once, or where the projection has a ``main_grad`` not at all. Under
    tensor parallelism the gradient of the hidden states is this rank's part of a sum over ranks; the caller places the
    operation that sums it.

    Args:
        hidden_NH: hidden states, any floating dtype; the same on all tensor-parallel ranks.
        projection_VH: the output projection, or this rank's rows of it (rank r has r·V to (r + 1)·V - 1).
        terms: over the N tokens.
        tp_group: the ranks that split the vocabulary.

    Returns:
        the weighted sum, 0-d and differentiable once; for each term [``tells``, N] without gradient, its losses
        without weights first; fp32 or wider.
    """
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden_NH, projection_VH))
    total, *told = _WeightedSum.apply(hidden_NH, projection_VH, terms, tp_group, wanted)
    return total, told


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, projection, terms, tp_group, wanted):  # type: ignore[override]
        wide = wide_dtype(hidden)
        told = [hidden.new_empty(term.tells, len(hidden), dtype=wide) for term in terms]
        shared = [
            [number for number, term in enumerate(terms) if term.temperature == temperature]
            for temperature in dict.fromkeys(term.temperature for term in terms)
        ]

        def read(rows: slice, logits_nV: Tensor, buffers: list[Tensor]) -> Tensor | None:
            summed = None
            for numbers, buffer in zip(shared, buffers, strict=True):
                group = _Group([terms[number] for number in numbers], rows, logits_nV, buffer, tp_group)
                values, *gradients = zip(*group.readings(), strict=True)
                for number, of_term in zip(numbers, values, strict=True):
                    told[number][:, rows] = of_term
                if any(wanted):
                    made = group.q.gradient(*(reduce(torch.add, of_terms) for of_terms in gradients))
                    summed = made if summed is None else summed.add_(made)
            return summed

        ctx.gradients = over_chunks(hidden, projection, read, wanted, buffers=len(shared))
        ctx.projection = projection
        ctx.mark_non_differentiable(*told)
        sums = [(values[0] * term.weight.to(wide)).sum() for term, values in zip(terms, told, strict=True)]
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum(), *told)

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


class _Group:
    """The terms of one temperature in a chunk, over the softmax that they share."""

    def __init__(
        self,
        terms: Sequence[Term],
        rows: slice,
        logits_nV: Tensor,
        buffer_nV: Tensor,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        self._terms, self._rows, self._ids = terms, rows, [term.ids(rows) for term in terms]
        vocab = logits_nV.shape[-1] * (1 if tp_group is None else tp_group.size())
        self._tails = [term.has_tail and ids.shape[-1] < vocab for term, ids in zip(terms, self._ids, strict=True)]
        self._all = torch.cat(self._ids, -1)
        self.q = Distribution.of(
            logits_nV, buffer_nV, self._all, tp_group, temperature=terms[0].temperature, tail=any(self._tails)
        )

    def readings(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What each term reads, with its gradient at the ids of all, [n, M]."""
        q, begin = self.q, 0
        for term, ids_nK, has_tail in zip(self._terms, self._ids, self._tails, strict=True):
            own = slice(begin, begin := begin + ids_nK.shape[-1])
            alone = len(self._terms) == 1
            same_nMK = None if alone else self._all.unsqueeze(-1) == ids_nK.unsqueeze(-2)
            log_tail = self._log_tail(same_nMK) if has_tail else None
            told, outside, at_ids = term.read(self._rows, OfIds(q.log_q_nK[:, own], q.gap_nK[:, own], log_tail))
            if same_nMK is not None:
                # What another term names is outside of this one, or the same id: then both name one gradient.
                place_nM = same_nMK.to(torch.uint8).argmax(-1)
                elsewhere = outside.unsqueeze(-1) * q.log_q_nK.exp()
                at_ids = torch.where(same_nMK.any(-1), at_ids.gather(-1, place_nM), elsewhere)
            yield told, outside, at_ids

    def _log_tail(self, same_nMK: Tensor | None) -> Tensor | None:
        """log of what is outside of a term's ids: of the tail of all, and of the ids that only others name."""
        q = self.q
        if same_nMK is None or q.log_tail_n is None:
            return q.log_tail_n
        first_nM = (self._all.unsqueeze(-1) == self._all.unsqueeze(-2)).to(torch.uint8).argmax(-1)
        counts_nM = (first_nM == torch.arange(first_nM.shape[-1], device=first_nM.device)) & ~same_nMK.any(-1)
        of_others = torch.where(counts_nM, q.log_q_nK, -math.inf)
        return torch.cat([q.log_tail_n.unsqueeze(-1), of_others], -1).logsumexp(-1)
