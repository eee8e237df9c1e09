"""A layer of the denoiser: a pre-norm transformer layer whose norms and residual branches are set by the noise's level.

Clean tokens and noisy ones go through the same weights. Keys and values are of the clean ones alone, so a noisy
position hangs on nothing but its own noise and the clean tokens that it may see.

Shapes: B rows, S positions, H hidden, N heads, D head dim, K keys,
C columns of the decoding state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter, functional

from megatron_vpmoe.model.attention import grape
from megatron_vpmoe.model.norm import RMSNorm
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.think.linear import linear
from megatron_vpmoe.think.stored_attention import Stored

Attend = Callable[[Tensor], Tensor]
"""From queries [B, N, S, D] to what they take of some keys' values, of the same shape."""

_PARTS = 6


class Modulation(Module):
    """AdaLN (Peebles and Xie 2023, arXiv 2212.09748): a level's waves as shifts, scales and gates; at first none.

    Args:
        config: of the model.
        parts: vectors of H that a level gives.
    """

    def __init__(self, config: VPTransformerConfig, parts: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.zeros(parts * config.hidden_size, config.hidden_size, dtype=config.params_dtype))
        self.bias = Parameter(torch.zeros(parts * config.hidden_size, dtype=config.params_dtype))
        self._parts = parts

    def forward(self, waves: Tensor) -> Tensor:
        """[..., parts, H] of a level's waves [..., H]."""
        return functional.linear(waves, self.weight, self.bias).unflatten(-1, (self._parts, -1))


def modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return normed * (1 + scale) + shift


class _Attention(Module):
    def __init__(self, config: VPTransformerConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, cast(int, config.kv_channels)
        self.size = self.heads * self.head_dim
        self.linear_qkv = linear(config.hidden_size, 3 * self.size, config, config.init_method)
        self.linear_qkv.weight.matrix_rows = tuple(slice(n * self.size, (n + 1) * self.size) for n in range(3))  # type: ignore[attr-defined]
        self.linear_proj = linear(self.size, config.hidden_size, config, config.output_layer_init_method)


class _FeedForward(Module):
    def __init__(self, config: VPTransformerConfig) -> None:
        super().__init__()
        size = cast(int, config.ffn_hidden_size)
        self.linear_fc1 = linear(config.hidden_size, 2 * size, config, config.init_method)
        self.linear_fc1.weight.matrix_rows = slice(0, size), slice(size, 2 * size)  # type: ignore[attr-defined]
        self.linear_fc2 = linear(size, config.hidden_size, config, config.output_layer_init_method)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear_fc1(x).chunk(2, -1)
        return self.linear_fc2(functional.silu(gate) * up)


class DenoiserLayer(Module):
    """Attention with RoPE and SwiGLU, each behind a modulated norm.

    Args:
        config: sizes, rotation base, epsilon and initialisation.
    """

    def __init__(self, config: VPTransformerConfig) -> None:
        super().__init__()
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.input_layernorm, self.pre_mlp_layernorm = RMSNorm(**norm), RMSNorm(**norm)
        self.self_attention, self.mlp = _Attention(config), _FeedForward(config)
        self.level_modulation = Modulation(config, _PARTS)

    def keys_values(self, hidden_BSH: Tensor, angle_BS1F: Tensor, by: Tensor) -> Tensor:
        """[B, S, 2, N, D]: rotated keys, and values, of clean tokens.

        Args:
            hidden_BSH: the residual stream of clean tokens.
            angle_BS1F: of their positions.
            by: [6, H], the modulation of level 0.
        """
        attention = self.self_attention
        kept = functional.linear(self._before_attention(hidden_BSH, by), attention.linear_qkv.weight[attention.size :])
        key, value = kept.unflatten(-1, (2, attention.heads, attention.head_dim)).unbind(-3)
        return torch.stack([grape.rotate(key, angle_BS1F), value], -3)

    def advance(self, hidden_BSH: Tensor, angle_BS1F: Tensor, by: Tensor, attend: Attend) -> Tensor:
        """The residual stream behind the layer, of clean tokens or of noisy ones.

        Args:
            hidden_BSH: the residual stream.
            angle_BS1F: of the queries' positions.
            by: the modulation of their level, [6, H] or [B, S, 6, H].
            attend: to the keys of clean tokens.
        """
        attention = self.self_attention
        query = functional.linear(self._before_attention(hidden_BSH, by), attention.linear_qkv.weight[: attention.size])
        query = grape.rotate(query.unflatten(-1, (attention.heads, attention.head_dim)), angle_BS1F)
        taken = attend(query.transpose(1, 2)).transpose(1, 2).flatten(-2)
        _, _, gate, shift, scale, second_gate = by.unbind(-2)
        hidden_BSH = hidden_BSH + (1 + gate) * attention.linear_proj(taken)
        inner = modulated(self.pre_mlp_layernorm(hidden_BSH), shift, scale)
        return hidden_BSH + (1 + second_gate) * self.mlp(inner)

    def advance_one(
        self, hidden_B1H: Tensor, angle_B11F: Tensor, by: Tensor, stored_BC2ND: Tensor, position_B: Tensor
    ) -> Tensor:
        """``advance`` of one position a row, over the keys and values that decoding has kept up to it."""
        return self.advance(hidden_B1H, angle_B11F, by, Stored(stored_BC2ND, position_B))

    def _before_attention(self, hidden_BSH: Tensor, by: Tensor) -> Tensor:
        shift, scale = by[..., 0, :], by[..., 1, :]
        return modulated(self.input_layernorm(hidden_BSH), shift, scale)
