"""What an objective reads of a model's output, by definition: whole logits, one token at a time, fp64, autograd.

Shapes: N tokens, H hidden, V vocabulary, K ids of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(hidden_NH: Tensor, projection_VH: Tensor) -> Tensor:
    """[N, V] in fp64."""
    return hidden_NH.double() @ projection_VH.double().T


def log_probability(logits_V: Tensor, label: int) -> Tensor:
    """log softmax(logits)[label], 0-d."""
    return logits_V[label] - torch.logsumexp(logits_V, 0)


def entropy(logits_V: Tensor) -> Tensor:
    """-Σ p log p in nats, 0-d."""
    log_p = logits_V - torch.logsumexp(logits_V, 0)
    return -(log_p.exp() * log_p).sum()


def divergence(
    logits_V: Tensor, ids_K: Tensor, log_p_K: Tensor, *, beta: float, tail: str, temperature: float
) -> Tensor:
    """tau² times the generalised Jensen-Shannon divergence over the buckets of ``ids``, 0-d.

    Args:
        logits_V: of the student.
        ids_K: int64.
        log_p_K: of the teacher; an id of -100 or less only fills up, unless the ids are all there are.
        beta: 0 forward KL, 1 reverse KL.
        tail: "bucket", "drop" or "renormalise".
        temperature: tau of the student's softmax.
    """
    if len(ids_K) < len(logits_V) or tail != "bucket":
        ids_K, log_p_K = ids_K[log_p_K > -100], log_p_K[log_p_K > -100]
    log_q = logits_V / temperature - torch.logsumexp(logits_V / temperature, 0)
    p, q = log_p_K.double().exp(), log_q[ids_K].exp()
    if tail == "renormalise":
        p = p / p.sum()
    if tail == "bucket" and len(ids_K) < len(logits_V):
        outside = torch.ones_like(logits_V, dtype=torch.bool)
        outside[ids_K] = False
        p = torch.cat([p, (1 - p.sum()).clamp(min=1e-12).unsqueeze(0)])
        q = torch.cat([q, log_q[outside].exp().sum().unsqueeze(0)])
    if beta == 0:
        value = (p * (p / q).log()).sum()
    elif beta == 1:
        value = (q * (q / p).log()).sum()
    else:
        m = beta * p + (1 - beta) * q
        value = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    return temperature**2 * value
