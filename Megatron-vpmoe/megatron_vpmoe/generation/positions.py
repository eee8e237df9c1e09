"""What follows from the rows' positions in a step, for all layers of a kind: places in the cache, rotations, masks.

At a token a row what a step costs is the number of operations, so angles of all layers come from one product, and
masks, distances and sinks are written for all of them together. Memory: where heads or layers differ, a bias of
layers · B · H · (1 + C) fp32 numbers, which is a few hundredths of the keys and values.

Shapes: B rows, L layers of the kind, G KV groups, P query heads a group, D head dim, C columns of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vpmoe.generation.kv_cache import columns_of
from megatron_vpmoe.model.attention import grape
from megatron_vpmoe.model.attention.self_attention import VPSelfAttention


class Here(NamedTuple):
    """Of one layer in one step.

    Attributes:
        place: int64 [B · G · 2], where new keys and values go among the rows of its cache, [R · G · 2 · (1 + C), D].
        rotation: cos and signed sin [B, 1, 1, D], with which x cos + roll(x, D/2) sin turns each pair; or None.
        bias: [B · G, P, 1 + C], added to the scores: -inf where not visible, else minus slope times distance; the
            sink's in its column.
    """

    place: Tensor
    rotation: tuple[Tensor, Tensor] | None
    bias: Tensor


def kind_of(attention: VPSelfAttention) -> tuple[int | None, str]:
    """Layers with the same can share a ``Kind``."""
    return attention.window, attention.position_embedding


class Kind:
    """Layers with one window and one sort of positions.

    Args:
        layers: at least one.
        dtype: of the scores, fp32 or wider.
    """

    def __init__(self, layers: Sequence[VPSelfAttention], dtype: torch.dtype) -> None:
        first = layers[0]
        self._layers, self.window, self._dtype = len(layers), first.window, dtype
        self._groups, self._per_group = first.num_groups, first.num_heads // first.num_groups
        device, tp = first.linear_proj.weight.device, first.tp_group
        self._slopes = self._frequency = self._sinks = None
        if first.position_embedding == "grape_a":
            slopes = grape.alibi_slopes(first.num_heads * tp.size(), device, tp.rank(), tp.size())
            self._slopes = -slopes.to(dtype).view(self._groups, self._per_group, 1)
        elif first.position_embedding != "none":
            # A negative angle's cosine is the angle's, and its sine has the sign that the first half needs.
            frequency_LF = torch.stack(_frequencies(layers))
            self._frequency = torch.cat([-frequency_LF, frequency_LF], 1)[:, None, None, None]
        if first.sink is not None:
            sinks = [layer.sink.detach() for layer in layers if layer.sink is not None]
            self._sinks = torch.stack(sinks).to(dtype).view(-1, 1, self._groups, self._per_group)

    def here(self, position_B: Tensor, longest: int, width: int) -> list[Here]:
        """For each layer.

        Args:
            position_B: int64, of the new tokens.
            longest: columns of a layer without a window that are read, at least the largest position plus one.
            width: 1 + C as the layers' cache has them.
        """
        column_B = 1 + (position_B if self.window is None else position_B % self.window)
        group = torch.arange(len(position_B) * self._groups * 2, device=position_B.device).view(len(position_B), -1)
        place = (group * width + column_B.unsqueeze(1)).flatten()
        rotations: Sequence[tuple[Tensor, Tensor] | None] = [None] * self._layers
        if self._frequency is not None:
            angle_LB11D = position_B.to(self._frequency.dtype)[:, None, None, None] * self._frequency
            turns = list(zip(angle_LB11D.cos().unbind(), angle_LB11D.sin().unbind(), strict=True))
            rotations = turns * (self._layers // len(turns))
        biases = self._biases(position_B, longest)
        return [Here(place, *both) for both in zip(rotations, biases, strict=True)]

    def _biases(self, position_B: Tensor, longest: int) -> Sequence[Tensor]:
        columns = columns_of(longest, self.window)
        position_B1 = position_B.unsqueeze(1)
        age_BC = position_B1 - torch.arange(-1, columns, device=position_B.device)
        if self.window is not None:
            age_BC %= self.window
        visible_BC = (age_BC >= 0) & (age_BC <= position_B1)
        if self._slopes is None:
            bias = torch.where(visible_BC, 0.0, -torch.inf).to(self._dtype)[:, None, None]
        else:
            bias = torch.where(visible_BC, age_BC.to(self._dtype), torch.inf)[:, None, None] * self._slopes
        layers = 1 if self._sinks is None else self._layers
        shape = layers, len(position_B), self._groups, self._per_group, 1 + columns
        bias = torch.empty(shape, dtype=self._dtype, device=bias.device).copy_(bias)
        bias[..., 0] = -torch.inf if self._sinks is None else self._sinks
        return bias.flatten(1, 2).unbind() * (self._layers // layers)


def _frequencies(layers: Sequence[VPSelfAttention]) -> list[Tensor]:
    """fp32 or wider [D / 2], of each layer; one where all have the same."""
    first, scale = layers[0], layers[0].config.grapem_log_freq_scale
    if first.grape_log_freq is None:
        return [grape.rope_frequencies(first.head_dim, first.config.rotary_base, first.linear_proj.weight.device)]
    return [torch.exp(layer.grape_log_freq.detach() / scale) for layer in layers if layer.grape_log_freq is not None]
