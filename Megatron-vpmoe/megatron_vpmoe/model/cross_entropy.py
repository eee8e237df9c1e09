"""Cross-entropy over a large vocabulary, a bounded number of tokens at a time, with its gradient made on the way.

The logits of a chunk of tokens exist once. While they do, everything that depends on them is computed: the losses, the
gradient of the hidden states, and the chunk's share of the gradient of the output projection. So nothing is kept for
the backward pass but these gradients, and nothing is computed twice: three matrix products, as without chunks. It takes
the weight of each token in the loss beforehand, since the projection's gradient sums over tokens; the backward pass
then only multiplies by the gradient of the one number that came out.

With the vocabulary split over tensor-parallel ranks each holds V columns of the logits. Ranks agree on each token's
log-sum-exp by a maximum and a sum, and on its label's logit by a sum to which only the label's owner contributes.

Shapes: N tokens, n tokens of a chunk, H hidden, V vocabulary on this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits and fp32 probabilities of one chunk: bounds the extra memory at any vocabulary size.
CHUNK_BYTES = 256 * 2**20


def weighted_cross_entropy(
    hidden_NH: Tensor,
    projection_VH: Tensor,
    labels_N: Tensor,
    weight_N: Tensor,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ weight · -log softmax(hidden · projectionᵀ)[label], and the terms without their weights.

    Memory beyond inputs and gradients: the logits of a chunk in the dtype of the hidden states and their probabilities
    in fp32, together CHUNK_BYTES. The projection's gradient sums over chunks in fp32, 4 bytes an element from here to
    the backward pass; it is narrowed once, and not at all where the projection has Megatron-Core's ``main_grad``: it is
    added there, and autograd gets zeros. Under tensor parallelism the gradient of the hidden states is this rank's part
    of a sum over ranks; the caller places the operation that sums it.

    Args:
        hidden_NH: hidden states, any floating dtype; the same on all tensor-parallel ranks.
        projection_VH: the output projection, or this rank's rows of it (rank r has r·V to (r + 1)·V - 1).
        labels_N: int64, ids of the whole vocabulary.
        weight_N: the weight of each token in the sum; takes no gradient.
        tp_group: the ranks that split the vocabulary.

    Returns:
        the weighted sum, 0-d and differentiable once, and each token's loss [N] without gradient; fp32 or wider.
    """
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden_NH, projection_VH))
    return _WeightedCrossEntropy.apply(hidden_NH, projection_VH, labels_N, weight_N, tp_group, wanted)


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, projection, labels, weight, tp_group, wanted):  # type: ignore[override]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if tp_group is not None:
            labels = labels - tp_group.rank() * projection.shape[0]
        weight = weight.to(wide)
        losses = weight.new_empty(labels.shape)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        # Of no tokens the gradient is zero, not absent.
        empty = torch.empty_like if len(labels) else torch.zeros_like
        grad_projection = empty(projection, dtype=wide) if wanted[1] else None

        vocab, logit_bytes, probability_bytes = len(projection), hidden.itemsize, wide.itemsize
        # The CPU's softmax may write where it reads; that of other devices need not.
        in_place = hidden.is_cpu and hidden.dtype == wide
        row_bytes = vocab * (probability_bytes + (0 if in_place else logit_bytes))
        rows = max(1, min(len(labels), CHUNK_BYTES // row_bytes))
        logits = hidden.new_empty(rows, vocab)
        probability = logits if in_place else logits.new_empty(logits.shape, dtype=wide)
        for begin in range(0, len(labels), rows):
            chunk = slice(begin, begin + rows)
            size = len(labels[chunk])
            losses[chunk] = _chunk(
                hidden[chunk], projection, labels[chunk], weight[chunk], logits[:size], probability[:size], tp_group
            )
            gradient = probability[:size] if hidden.dtype == wide else logits[:size].copy_(probability[:size])
            if grad_hidden is not None:
                torch.mm(gradient, projection, out=grad_hidden[chunk])
            if grad_projection is not None:
                _add_product(grad_projection, gradient, probability[:size], hidden[chunk], beta=1 if begin else 0)
        ctx.gradients = grad_hidden, grad_projection
        ctx.projection = projection
        ctx.mark_non_differentiable(losses)
        return (losses * weight).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the gradient of weighted_cross_entropy can be taken once: it has been handed out")
        (grad_hidden, grad_projection), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad)
        if grad_projection is not None:
            grad_projection = _handed_out(grad_projection.mul_(grad), ctx.projection)
        return grad_hidden, grad_projection, None, None, None, None


def _add_product(sum_VH: Tensor, gradient_nV: Tensor, wide_nV: Tensor, hidden_nH: Tensor, *, beta: int) -> None:
    """sum · beta + gradientᵀ · hidden, summed in the dtype of ``sum_VH``; ``wide_nV`` is the gradient unrounded."""
    if hidden_nH.dtype == sum_VH.dtype or hidden_nH.is_cpu:
        # The CPU has no product of bf16 factors with an fp32 result.
        sum_VH.addmm_(wide_nV.t(), hidden_nH.to(sum_VH.dtype), beta=beta)
    else:
        torch.addmm(sum_VH, gradient_nV.t(), hidden_nH, beta=beta, out_dtype=sum_VH.dtype, out=sum_VH)


def _handed_out(sum_VH: Tensor, projection_VH: Tensor) -> Tensor:
    """What autograd gets of the projection's gradient; what has gone into ``main_grad`` is not rounded."""
    main_grad = getattr(projection_VH, "main_grad", None)
    if main_grad is None or sum_VH.dtype == projection_VH.dtype:
        return sum_VH.to(projection_VH.dtype)
    main_grad.add_(sum_VH)
    # Not None: the hooks of DDP and the other half of a tied embedding add to it.
    return torch.zeros_like(projection_VH)


def _chunk(
    hidden_nH: Tensor,
    projection_VH: Tensor,
    labels_n: Tensor,
    weight_n: Tensor,
    logits_nV: Tensor,
    probability_nV: Tensor,
    tp_group: dist.ProcessGroup | None,
) -> Tensor:
    """Losses [n] of a chunk; the gradient of their weighted sum by the logits is left in ``probability_nV``.

    Overwrites the buffers, which may be one. The gradient is weight · (p - [label]). At the label it is
    weight · (exp(-loss) - 1) to full precision: of a token that is nearly certain little more than rounding would be
    left otherwise.
    """
    torch.mm(hidden_nH, projection_VH.t(), out=logits_nV)
    largest = logits_nV.amax(-1).to(probability_nV.dtype)
    is_mine = (labels_n >= 0) & (labels_n < projection_VH.shape[0])
    own_label = torch.where(is_mine, labels_n, 0).unsqueeze(-1)
    label_logit = logits_nV.gather(-1, own_label).squeeze(-1).to(largest.dtype)
    torch.softmax(logits_nV, dim=-1, dtype=probability_nV.dtype, out=probability_nV)
    # The largest logit has probability 1 / Σ exp(x - largest): the sum, without another pass that exponentiates.
    own_sum = 1.0 / probability_nV.amax(-1)
    if tp_group is None or tp_group.size() == 1:
        loss, share = own_sum.log() + (largest - label_logit), 1.0
    else:
        own_largest = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tp_group)
        own_sum *= torch.exp(own_largest - largest)
        sums = torch.stack([own_sum, torch.where(is_mine, largest - label_logit, 0.0)])
        dist.all_reduce(sums, group=tp_group)
        loss, share = sums[0].log() + sums[1], own_sum / sums[0]

    probability_nV.mul_((weight_n * share).unsqueeze(-1))
    at_label = torch.where(is_mine, weight_n * torch.expm1(-loss), probability_nV.gather(-1, own_label).squeeze(-1))
    probability_nV.scatter_(-1, own_label, at_label.unsqueeze(-1))
    return loss
