"""Multi-head latent attention and running means as defined, one token, one head, one key at a time, in fp64.

DeepSeek-AI 2024, arXiv 2405.04434, equations 9 to 19, without a latent of queries; memory entries are further latents
without a rotated key. No shared code with the product; gradients by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ref.attention import rotate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square, times the weight."""
    return weight * x / torch.sqrt((x * x).sum() / len(x) + eps)


def latent_attention(
    x: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    memory: Sequence[Sequence[Tensor]],
    *,
    heads: int,
    head_dim: int,
    frequency: Tensor,
    eps: float,
) -> list[Tensor]:
    """x and what it attends to, of the tokens of one document.

    Args:
        x: vectors [H], token by token.
        weights: by the names of the product's parameters.
        memory: of each token the entries [H] that it may read.
        heads: of the layer.
        head_dim: without the rotated part.
        frequency: radians a token of each pair of the rotated part.
        eps: of the norms.
    """
    rope = 2 * len(frequency)

    def latent(vector: Tensor) -> Tensor:
        return rms_norm(vector, weights["latent_layernorm.weight"], eps)

    normed = [rms_norm(one, weights["input_layernorm.weight"], eps) for one in x]
    latents = [latent(weights["linear_latent.weight"] @ one) for one in normed]
    rope_keys = [rotate(weights["linear_rope_key.weight"] @ one, t, frequency) for t, one in enumerate(normed)]
    out = []
    for t, one in enumerate(normed):
        queries = weights["linear_query.weight"] @ one
        recalled = [latent(weights["linear_memory.weight"] @ entry) for entry in memory[t]]
        taken = []
        for h in range(heads):
            query = queries[h * (head_dim + rope) : (h + 1) * (head_dim + rope)]
            content, turned = query[:head_dim], rotate(query[head_dim:], t, frequency)
            key_of = weights["linear_key.weight"][h * head_dim : (h + 1) * head_dim]
            value_of = weights["linear_value.weight"][h * head_dim : (h + 1) * head_dim]
            logits = [
                (content @ (key_of @ latents[j]) + turned @ rope_keys[j]) / math.sqrt(head_dim + rope)
                for j in range(t + 1)
            ]
            logits += [content @ (key_of @ entry) / math.sqrt(head_dim + rope) for entry in recalled]
            exponents = [torch.exp(logit) for logit in logits]
            total = sum(exponents, torch.zeros((), dtype=torch.float64))
            read = [*latents[: t + 1], *recalled]
            taken.append(
                sum((e / total * (value_of @ c) for e, c in zip(exponents, read, strict=True)), 0 * value_of[:, 0])
            )
        out.append(x[t] + weights["linear_proj.weight"] @ torch.cat(taken))
    return out


def routed(x: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Of the tokens of one document: softmax of a linear of the mean of the tokens so far."""
    out = []
    for t in range(len(x)):
        mean = sum(x[: t + 1], torch.zeros_like(x[0])) / (t + 1)
        exponents = torch.exp(weight @ mean)
        out.append(exponents / exponents.sum())
    return out
