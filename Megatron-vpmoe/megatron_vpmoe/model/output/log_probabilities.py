"""Log-probabilities of labels, and entropies, as tensors that an objective differentiates through.

What weighs a token is known only after its log-probability is: a clipped ratio, the sigmoid of a margin. So the
log-sum-exp of each token is kept, and the backward pass computes a chunk's logits once more: four matrix products.

Shapes: as in ``chunks``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.output.chunks import Distribution, main_grad, over_chunks, owned, scatter, wide_dtype


def log_probabilities(
    hidden_NH: Tensor,
    projection_VH: Tensor,
    labels_N: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    *,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden · projectionᵀ)[label], and if asked for the entropy of the softmax in nats.

    Memory beyond inputs and gradients: a chunk's logits and one fp32 buffer of that shape (two for the entropy),
    together CHUNK_BYTES, and two or three numbers a token. The projection's gradient is summed in fp32: in its
    ``main_grad`` where it has one, otherwise in 4 bytes an element during the backward pass, rounded once. Under tensor
    parallelism as ``weighted_sum``.

    Args:
        hidden_NH: hidden states, any floating dtype; the same on all tensor-parallel ranks.
        projection_VH: the output projection, or this rank's rows of it.
        labels_N: int64, ids of the whole vocabulary.
        tp_group: the ranks that split the vocabulary.
        entropy: whether to calculate it; None is returned otherwise.

    Returns:
        both [N], differentiable once; fp32 or wider.
    """
    return _LogProbabilities.apply(hidden_NH, projection_VH, labels_N, tp_group, entropy)


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, projection, labels, tp_group, with_entropy):  # type: ignore[override]
        log_p, log_sum_exp, entropy = (hidden.new_empty(len(hidden), dtype=wide_dtype(hidden)) for _ in range(3))

        def read(rows: slice, logits_nV: Tensor, buffers: list[Tensor]) -> None:
            q = Distribution.of(logits_nV, buffers[0], labels[rows].unsqueeze(-1), tp_group)
            log_p[rows], log_sum_exp[rows] = q.log_q_nK.squeeze(-1), q.log_sum_exp_n
            if with_entropy:
                log_q = buffers[1].copy_(logits_nV).sub_(q.log_sum_exp_n.unsqueeze(-1))
                entropy[rows] = -log_q.mul_(q.buffer_nV).sum(-1) * q.share_n

        over_chunks(hidden, projection, read, (False, False), buffers=2 if with_entropy else 1)
        if with_entropy and tp_group is not None and tp_group.size() > 1:
            dist.all_reduce(entropy, group=tp_group)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, projection, labels, log_p, log_sum_exp, entropy)
        ctx.tp_group, ctx.main_grad = tp_group, main_grad(projection)
        return log_p, entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, by_log_p, by_entropy):  # type: ignore[override]
        """The gradient by a logit: g ([v = label] - Q_v) + g_H (-Q_v log Q_v - Q_v H)."""
        hidden, projection, labels, log_p, log_sum_exp, entropy = ctx.saved_tensors
        by_log_p = torch.zeros_like(log_p) if by_log_p is None else by_log_p

        def read(rows: slice, logits_nV: Tensor, buffers: list[Tensor]) -> Tensor:
            log_q, gradient = buffers[-1], buffers[0]
            g, at = by_log_p[rows].unsqueeze(-1), log_p[rows].unsqueeze(-1)
            log_q.copy_(logits_nV).sub_(log_sum_exp[rows].unsqueeze(-1))
            torch.exp(log_q, out=gradient)
            # 1 - Q to full precision: of a token that is nearly certain little more than rounding would be left.
            at_label = -g * torch.expm1(at)
            if by_entropy is None:
                gradient.mul_(-g)
            else:
                g_H, h = by_entropy[rows].unsqueeze(-1), entropy[rows].unsqueeze(-1)
                gradient.mul_(log_q.add_(h).mul_(-g_H).sub_(g))
                at_label -= g_H * at.exp() * (at + h)
            mine, own = owned(labels[rows].unsqueeze(-1), len(projection), ctx.tp_group)
            return scatter(gradient, own, mine, at_label)

        wanted, into = ctx.needs_input_grad[:2], ctx.main_grad if ctx.needs_input_grad[1] else None
        buffers = 1 if by_entropy is None else 2
        grad_hidden, grad_projection = over_chunks(hidden, projection, read, wanted, buffers=buffers, into=into)
        if grad_projection is not None:
            grad_projection = torch.zeros_like(projection) if into is not None else grad_projection.to(projection.dtype)
        return grad_hidden, grad_projection, None, None, None
