"""The plain conversion of a layer to the student's shapes, without any text: mean pooling and the largest columns.

Shapes: H heads, G groups, D head dim, C hidden, F feed-forward width.
"""

from __future__ import annotations

from torch import Tensor

from megatron_vpmoe.config import RunConfig
from vpmoe.upcycle.rung_below import in_layer
from vpmoe.weights import Weights
from vpmoe.weights.heads import join_heads, split_heads

QKV = "self_attention.linear_qkv.weight"
PROJ = "self_attention.linear_proj.weight"
FC1 = "mlp.linear_fc1.weight"
FC2 = "mlp.linear_fc2.weight"


def pooled_qkv(mixed: Tensor, old: RunConfig, new: RunConfig) -> Tensor:
    """Means over runs of heads and groups, in Megatron's mixed layout again."""
    heads, groups = new.model.num_attention_heads, new.model.num_query_groups
    query, key, value = split_heads(mixed, old.model.num_attention_heads, old.model.num_query_groups)
    return join_heads(
        *(part.unflatten(0, (n, -1)).mean(1) for part, n in ((query, heads), (key, groups), (value, groups)))
    )


def summed_projection(weight: Tensor, old: RunConfig, new: RunConfig) -> Tensor:
    """[C, H D] -> [C, H' D]: the sum over the heads that became one, since a mean would shrink the output."""
    heads, dim = new.model.num_attention_heads, new.model.kv_channels
    together = old.model.num_attention_heads // heads
    return weight.unflatten(1, (heads, together, dim)).sum(2).flatten(1)


def largest_columns(second: Tensor, width: int) -> Tensor:
    """Indices, ascending, of the neurons with the largest columns of the second matrix."""
    return second.norm(dim=0).topk(width).indices.sort().values


def plain_attention(weights: Weights, index: int, old: RunConfig, new: RunConfig) -> dict[str, Tensor]:
    """fp32 matrices of a layer's attention (index from 0), by their names inside the layer."""
    mixed, projection = (weights[in_layer(index, name)].read().float() for name in (QKV, PROJ))
    return {QKV: pooled_qkv(mixed, old, new), PROJ: summed_projection(projection, old, new)}


def plain_feed_forward(weights: Weights, index: int, new: RunConfig) -> dict[str, Tensor]:
    """fp32 matrices of a layer's feed-forward: silu(g) u becomes relu((g + u) / 2)², g u where the two agree."""
    first, second = (weights[in_layer(index, name)].read().float() for name in (FC1, FC2))
    kept = largest_columns(second, new.model.ffn_hidden_size)
    gate, up = first.chunk(2)
    return {FC1: ((gate + up) / 2)[kept], FC2: second[:, kept]}
