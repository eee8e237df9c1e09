"""Attention of one new token a row to the cache: project, norm, rotate, store, score.

The tensor products of a layer are one product: the A factors come from a weight with rows of zeros between them, so
that the linear's output is, of every query, key and value, what it takes of each row of all B factors.

Precision: scores, softmax and rotations are fp32 or wider. Keys and values are read in the cache's own dtype: products
of bf16 have fp32 sums, and probabilities are rounded to bf16 before they weigh the values, as in flash kernels. Torch
has no such product on a CPU, where bf16 keys and values are widened each step; fp32 ones are never narrowed.

Shapes: B rows, H hidden, G KV groups, P query heads a group, D head dim, C columns of the cache. Heads and groups are
those of one tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_vpmoe.generation.kv_cache import KVCache
from megatron_vpmoe.generation.linear import Linear, Norm
from megatron_vpmoe.generation.positions import Here
from megatron_vpmoe.model.attention.self_attention import VPSelfAttention


class Attention:
    """Of one layer, from normed hidden states to the input of its output projection."""

    def __init__(self, attention: VPSelfAttention, *, packed: bool) -> None:
        self._number, self._scale = attention.layer_number, attention.softmax_scale
        self._groups, self._per_group = attention.num_groups, attention.num_heads // attention.num_groups
        q_norm, k_norm = attention.q_layernorm, attention.k_layernorm
        self._norm = None if q_norm is None else Norm(*[q_norm] * self._per_group, k_norm)
        self._wide = torch.promote_types(attention.linear_proj.weight.dtype, torch.float32)
        share = attention.value_residual_scale
        self._share = None if share is None else share.detach().to(self._wide)
        if attention.tpa is None:
            self._factors, linear = 0, attention.linear_qkv
            self._project = Linear(linear.weight, linear.bias, packed=packed)
        else:
            self._factors = attention.tpa.q_rank + 2 * attention.tpa.rank
            self._project = Linear(*_spread_factors(attention), packed=packed)
            bias = attention.qkv_bias
            self._bias = None if bias is None else bias.detach().view(1, -1, attention.head_dim)
        self._viewed: Any = None

    def __call__(self, x_BH: Tensor, first_BGD: Tensor | None, here: Here, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Store the token's key and value and attend.

        Returns:
            [B, G · P · D], and the layer's own values [B, G, D].
        """
        rows, per_group = len(x_BH), self._per_group
        mixed = self._projected(x_BH)
        self._turn(mixed[:, :, : per_group + 1], here)
        own_BGD = mixed[:, :, per_group + 1]
        if self._share is not None:
            assert first_BGD is not None
            wide = own_BGD.to(self._wide)
            torch.lerp(first_BGD.to(self._wide), wide, self._share, out=wide)
            if wide is not own_BGD:
                own_BGD.copy_(wide)
        flat = mixed.view(rows * self._groups, per_group + 2, -1)
        stored, key, value = self._views(cache, rows, here.bias.shape[-1])
        stored.index_copy_(0, here.place, flat[:, per_group:].reshape(-1, flat.shape[-1]))
        query = flat[:, :per_group]
        return attended(query, key, value, here.bias, self._scale).view(rows, -1), own_BGD

    def _projected(self, x_BH: Tensor) -> Tensor:
        """Megatron's mixed layout [B, G, P + 2, D]: of each group its queries, its key, its value."""
        out, groups, each = self._project(x_BH), self._groups, self._per_group + 2
        if not self._factors:
            return out.view(len(x_BH), groups, each, -1)
        size = groups * each * self._factors
        a = out[:, :size].view(-1, groups * each, self._factors)
        b = out[:, size:].view(len(x_BH), self._factors, -1)
        mixed = torch.bmm(a, b) if self._bias is None else torch.baddbmm(self._bias, a, b)
        return mixed.view(len(x_BH), groups, each, -1)

    def _turn(self, scored: Tensor, here: Here) -> None:
        """Norm and rotate queries and keys [B, G, P + 1, D], in place."""
        wide = scored if self._norm is None else self._norm.wide(scored)
        if here.rotation is not None:
            cos, sin = here.rotation
            wide = wide.to(cos.dtype)
            torch.addcmul(wide * cos, wide.roll(wide.shape[-1] // 2, -1), sin, out=scored)
        elif wide is not scored:
            scored.copy_(wide)

    def _views(self, cache: KVCache, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's cache to write, [R · G · 2 · (1 + C), D], and what is read of it: keys [B · G, D, columns] and
        values [B · G, columns, D]. Made again only where they change.
        """
        stored = cache.layer(self._number)
        if self._viewed is None or self._viewed[0] is not stored or self._viewed[1:3] != (rows, columns):
            key, value = stored[:rows, :, :, :columns].flatten(0, 1).unbind(1)
            self._viewed = stored, rows, columns, (stored.flatten(0, 3), key.transpose(1, 2), value)
        return self._viewed[3]


def attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale · query key + bias) value, with scores and softmax in the dtype of the bias.

    Args:
        query: [N, P, D].
        key: [N, D, C].
        value: [N, C, D].
        bias: fp32 or wider [N, P, C].

    Returns:
        [N, P, D] in the dtype of the values.
    """
    dtype, wide = value.dtype, bias.dtype
    if dtype != wide and query.is_cuda:
        score = torch.add(bias, torch.bmm(query, key, out_dtype=wide), alpha=scale)
        return torch.bmm(torch.softmax(score, -1).to(dtype), value)
    if dtype != wide:
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    out = torch.bmm(torch.softmax(torch.baddbmm(bias, query, key, alpha=scale), -1), value)
    return out if out.dtype == dtype else out.to(dtype)


def _spread_factors(attention: VPSelfAttention) -> tuple[Tensor, Tensor | None]:
    """Weight and bias whose output is A [G · (P + 2), Rq + 2 R], of which a query, key or value has its own factors and
    zeros, divided by their rank, and then B [Rq + 2 R, D]. A copy of both projections.
    """
    g = attention.tpa
    assert g is not None
    groups, per_group = g.num_groups, g.num_heads // g.num_groups

    def spread(a_NX: Tensor) -> Tensor:
        query, key, value = a_NX.split(g.a_sizes)
        out = a_NX.new_zeros(groups, per_group + 2, g.q_rank + 2 * g.rank, a_NX.shape[1])
        out[:, :per_group, : g.q_rank] = query.view(groups, per_group, g.q_rank, -1) / g.q_rank
        out[:, per_group, g.q_rank : g.q_rank + g.rank] = key.view(groups, g.rank, -1) / g.rank
        out[:, per_group + 1, g.q_rank + g.rank :] = value.view(groups, g.rank, -1) / g.rank
        return out.flatten(0, 2)

    a, b = attention.linear_tpa_a, attention.linear_tpa_b.weight.detach()
    weight = torch.cat([spread(a.weight.detach()), b])
    if a.bias is None:
        return weight, None
    return weight, torch.cat([spread(a.bias.detach().unsqueeze(1)), b.new_zeros(len(b), 1)]).squeeze(1)
