"""Attention as its definition reads, one token, one head, one key at a time, in fp64. Slow on purpose.

Everything is written out from the formulas: no shared code with the product, no broadcasting over heads or keys, no
softmax function. Tensors in, tensors out; gradients by autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP64 = torch.float64


def alibi_slope(head: int, num_heads: int) -> float:
    """m_h as the ALiBi paper gives it: a geometric sequence from 2^(-8/n) for n heads, n a power of two.

    Otherwise the sequence of the largest power of two below, continued by the odd members of the doubled sequence.
    """
    power = 1
    while power * 2 <= num_heads:
        power *= 2
    if head < power:
        return (2.0 ** (-8.0 / power)) ** (head + 1)
    return (2.0 ** (-8.0 / (2 * power))) ** (2 * (head - power) + 1)


def rotate(x_D: Tensor, position: int, frequency_F: Tensor) -> Tensor:
    """One vector, each pair (x_j, x_{j + D/2}) turned by position · frequency_j as a complex number."""
    half = x_D.shape[0] // 2
    out: list[Tensor] = [torch.zeros((), dtype=FP64)] * (2 * half)
    for j in range(half):
        angle = position * frequency_F[j]
        turned = torch.complex(x_D[j], x_D[j + half]) * torch.complex(torch.cos(angle), torch.sin(angle))
        out[j], out[j + half] = turned.real, turned.imag
    return torch.stack(out)


def grape_m_frequency(log_frequency_F: Tensor, scale: float) -> Tensor:
    """f_j = e^(λ_j / s)."""
    return torch.stack([torch.exp(value / scale) for value in log_frequency_F])


def tensor_product(a: Tensor, b: Tensor, heads: int, rank: int, head_dim: int) -> Tensor:
    """[heads, D] of one token: head h is the mean over ranks r of a[h, r] · b[r, :]; a and b flat, row-major."""
    rows = []
    for h in range(heads):
        total = torch.zeros(head_dim, dtype=FP64)
        for r in range(rank):
            total = total + a[h * rank + r] * b[r * head_dim : (r + 1) * head_dim]
        rows.append(total / rank)
    return torch.stack(rows)


def value_residual(value: Tensor, first_value: Tensor, scale: Tensor) -> Tensor:
    """λ v + (1 - λ) v_1."""
    return scale * value + (1.0 - scale) * first_value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    document: list[int],
    window: int | None = None,
    alibi: bool = False,
    sink: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One row: queries [Q, H, D] (the last Q of K tokens), keys and values [K, G, D]; returns [Q, H, D].

    ``document`` names the document of each of the K tokens. The sink is a logit concatenated to the scores of its head,
    with no value behind it.
    """
    queries, heads, dim = query.shape
    keys, groups, _ = key.shape
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    out = []
    for index in range(queries):
        i = keys - queries + index
        row = []
        for h in range(heads):
            g = h // (heads // groups)
            seen = [j for j in range(i + 1) if document[j] == document[i] and (window is None or i - j < window)]
            logits = []
            for j in seen:
                logit = scale * torch.dot(query[index, h], key[j, g])
                logits.append(logit - alibi_slope(h, heads) * (i - j) if alibi else logit)
            if sink is not None:
                logits.append(sink[h])
            stacked = torch.stack(logits)
            weight = torch.exp(stacked - stacked.max().detach())
            weight = weight / weight.sum()
            total = torch.zeros(dim, dtype=FP64)
            for n, j in enumerate(seen):
                total = total + weight[n] * value[j, g]
            row.append(total)
        out.append(torch.stack(row))
    return torch.stack(out)
