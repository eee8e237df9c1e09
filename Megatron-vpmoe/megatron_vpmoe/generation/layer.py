"""One layer of the training model for one new token a row.

Shapes: B rows, H hidden, G KV groups, D head dim.
"""

from __future__ import annotations

from typing import Any, cast

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_vpmoe.generation.attention import Attention
from megatron_vpmoe.generation.experts import Experts
from megatron_vpmoe.generation.kv_cache import KVCache
from megatron_vpmoe.generation.linear import Linear, Norm
from megatron_vpmoe.generation.positions import Here
from megatron_vpmoe.model.attention.self_attention import VPSelfAttention


class Layer:
    """Attention to the cache, and a feed-forward; its weights must not change while this lives.

    Args:
        layer: of the training model.
        packed: see ``Linear``.
    """

    def __init__(self, layer: Any, *, packed: bool) -> None:
        attention: VPSelfAttention = layer.self_attention
        self._mlp, tp = layer.mlp, attention.tp_group
        self._reduce = tp if tp.size() > 1 else None
        self._input_norm, self._mlp_norm = Norm(layer.input_layernorm), Norm(layer.pre_mlp_layernorm)
        self._attend = Attention(attention, packed=packed)
        self._out = Linear(attention.linear_proj.weight, attention.linear_proj.bias, packed=packed)
        routed = isinstance(self._mlp, MoELayer)
        alone = routed and self._reduce is None and self._mlp.ep_group.size() == 1
        self._routed, self._experts = routed, Experts(self._mlp) if alone else None
        dense = self._mlp.shared_experts if routed else self._mlp
        self._dense = None if dense is None else FeedForward(dense, packed=packed)

    def run(self, hidden_BH: Tensor, first_BGD: Tensor | None, here: Here, cache: KVCache) -> Tensor:
        """Add the layer's output to ``hidden_BH``, in place; returns layer 1's values."""
        out_BN, value_BGD = self._attend(self._input_norm(hidden_BH), first_BGD, here, cache)
        self._out.add(hidden_BH, out_BN, self._reduce)
        x_BH = self._mlp_norm(hidden_BH)
        if self._routed and (self._experts is None or not self._experts.suit(len(x_BH))):
            out, bias = self._mlp(x_BH.unsqueeze(0))
            hidden_BH += out[0] if bias is None else out[0] + bias
        else:
            if self._experts is not None:
                self._experts.add(hidden_BH, x_BH)
            if self._dense is not None:
                self._dense.last.add(hidden_BH, self._dense(x_BH), self._reduce)
        return value_BGD if first_BGD is None else first_BGD


class FeedForward:
    """A dense feed-forward up to its last linear, ``last``."""

    def __init__(self, mlp: Any, *, packed: bool) -> None:
        first, self.last = (Linear(one.weight, one.bias, packed=packed) for one in (mlp.linear_fc1, mlp.linear_fc2))
        self._first, self._activation = first, cast(Any, mlp.config.activation_func)
        self._gated = mlp.config.gated_linear_unit
        self._width = len(mlp.linear_fc1.weight) // 2

    def __call__(self, x_BH: Tensor) -> Tensor:
        up = self._first(x_BH)
        if self._gated:
            return self._activation(up[:, : self._width]).mul_(up[:, self._width :])
        return self._activation(up)
