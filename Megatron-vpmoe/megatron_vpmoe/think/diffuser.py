"""The diffuser: from the tokens up to a position it denoises the embedding of the next one.

Clean tokens go through the layers once and leave keys and values; from noise DDIM then goes through the same layers a
few times, every position for itself. What comes out at a position hangs on the tokens up to it and on its key of noise,
in training, in a packed row and in decoding alike.

Shapes: B rows, S positions, H hidden, N heads, D head dim, C columns of the decoding state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from megatron_vpmoe.model.attention import grape
from megatron_vpmoe.model.attention.backends import core_attention, select_backend
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.compilation import of_any_columns, of_any_rows, part
from megatron_vpmoe.model.norm import RMSNorm
from megatron_vpmoe.model.recompute import recomputed
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.counter import normal, uniform
from megatron_vpmoe.runtime.ranges import annotated
from megatron_vpmoe.think.decoding import Entry, Past
from megatron_vpmoe.think.denoiser_layer import Attend, DenoiserLayer, Modulation, modulated
from megatron_vpmoe.think.linear import linear
from megatron_vpmoe.think.schedule import Schedule
from megatron_vpmoe.think.stored_attention import Stored, store

_LEVEL = -1
"""The place of a key of noise that the level is drawn at; its numbers lie at 0, 1, ..."""


class Diffuser(Module):
    """A causal conditional denoiser, and DDIM with it; at first its estimate is zero, the mean of what is standardised.

    Args:
        config: heads, widths, rotation base, epsilon, initialisation.
        layers: of the denoiser.
        levels: T of the schedule.
        steps: of DDIM.

    Attributes:
        compiled_step: whether layers' part of ``step`` is (``generation.compiled_step``).
    """

    compiled_step = False

    def __init__(self, config: VPTransformerConfig, *, layers: int, levels: int, steps: int) -> None:
        super().__init__()
        self.config, self.schedule = config, Schedule(levels, steps)
        self.layers = ModuleList(DenoiserLayer(config) for _ in range(layers))
        self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.final_modulation = Modulation(config, 2)
        self.estimate = linear(config.hidden_size, config.hidden_size, config, None)

    @classmethod
    def of(cls, config: VPTransformerConfig) -> Diffuser:
        """That of a configuration."""
        return cls(config, layers=config.num_layers, levels=config.diffusion_levels, steps=config.ddim_steps)

    def forward(
        self, x_BSH: Tensor, layout: SequenceLayout, past: Past | None = None, *, noise_key_BS: Tensor
    ) -> Tensor:
        """The estimate [B, S, H] of the embedding that follows each position.

        Args:
            x_BSH: standardised embeddings of the tokens.
            layout: documents and positions.
            past: receives keys and values of a single row, where it is to be continued.
            noise_key_BS: int64, a hash of seed, document and position, such as ``random_bits(draw_key(seed, document),
                position)``: what DDIM starts from.
        """
        attends = self._context(x_BSH, layout, past)
        angle = self._angle(layout.position + 1)
        return self._denoised(x_BSH, angle, attends, noise_key_BS)

    def loss(self, x_BSH: Tensor, target_BSH: Tensor, layout: SequenceLayout, noise_key_BS: Tensor) -> Tensor:
        """fp32 or wider [B, S]: the mean over channels of the estimate's squared error.

        Every position has a level of its own, even over 1 to T, where DDIM starts. Level and noise follow from its key.

        Args:
            x_BSH: standardised embeddings of the tokens.
            target_BSH: those of the tokens that follow.
            layout: documents and positions.
            noise_key_BS: int64, another in each step of a training.
        """
        level_BS = 1 + (uniform(noise_key_BS, torch.full_like(noise_key_BS, _LEVEL)) * self.schedule.levels).long()
        wide = torch.promote_types(target_BSH.dtype, torch.float32)
        noise = normal(noise_key_BS, target_BSH.shape[-1]).to(wide)
        target_BSH = target_BSH.to(wide)
        noisy_BSH = self.schedule.noised(target_BSH, noise, level_BS)
        attends, angle = self._context(x_BSH, layout, None), self._angle(layout.position + 1)
        every = torch.arange(self.schedule.levels + 1, device=x_BSH.device)
        by = [table[level_BS] for table in self._modulations(every)]
        found_BSH = self._estimate(noisy_BSH.to(x_BSH.dtype), angle, attends, by)
        return (found_BSH.to(wide) - target_BSH).square().mean(-1)

    def entries(self) -> dict[str, Entry]:
        """What decoding keeps: of each layer keys and values of the clean tokens."""
        attention = cast(DenoiserLayer, self.layers[0]).self_attention
        entry = Entry((2, attention.heads, attention.head_dim), self.estimate.weight.dtype, grows=True)
        return {_name(number): entry for number in range(len(self.layers))}

    def step(self, x_BH: Tensor, position_B: Tensor, state: dict[str, Tensor], *, noise_key_B: Tensor) -> Tensor:
        """The estimate [B, H] behind one new token a row.

        Args:
            x_BH: its standardised embedding.
            position_B: int64, where it stands in its document.
            state: of each layer [B, C, 2, N, D], C above every position; the new token's is written.
            noise_key_B: int64, as in ``forward``.
        """

        def stored(number: int, kept: Tensor) -> Attend:
            store(state[_name(number)], position_B, kept.squeeze(1))
            return Stored(state[_name(number)], position_B)

        position_B1 = position_B.unsqueeze(1)
        attends = self._attends(x_BH.unsqueeze(1), self._angle(position_B1), stored)
        angle = self._angle(position_B1 + 1)
        return self._denoised(x_BH.unsqueeze(1), angle, attends, noise_key_B.unsqueeze(1)).squeeze(1)

    def backend_name(self, device: torch.device, *, recurs: bool = True) -> str:
        """What runs whole sequences on ``device``; nothing is compiled for a shape that does not recur."""
        name = select_backend(self.config.attention_backend_name, window=None, device=device)
        return "reference" if name == "flex" and not recurs else name

    def _context(self, x_BSH: Tensor, layout: SequenceLayout, past: Past | None) -> list[Attend]:
        backend = self.backend_name(x_BSH.device, recurs=layout.recurs)

        def whole(number: int, kept: Tensor) -> Attend:
            if past is not None:
                past.put(_name(number), kept.squeeze(0))
            key, value = kept.permute(2, 0, 3, 1, 4)
            return functools.partial(_attended_whole, key, value, layout, backend)

        return self._attends(x_BSH, self._angle(layout.position), whole)

    def _attends(self, x_BSH: Tensor, angle: Tensor, kept_of: Callable[[int, Tensor], Attend]) -> list[Attend]:
        """Of each layer what attends to its clean tokens; ``kept_of`` makes it of a layer's keys and values."""
        attends: list[Attend] = []
        with annotated("context"):
            modulations = self._modulations(_of_all(0, x_BSH.device))
            for number, (layer, by) in enumerate(zip(self.layers, modulations[:-1], strict=True)):
                layer = cast(DenoiserLayer, layer)
                if attends:
                    before = cast(DenoiserLayer, self.layers[number - 1])
                    x_BSH = self._advanced(before, x_BSH, angle, modulations[number - 1], attends[-1])
                attends.append(kept_of(number, layer.keys_values(x_BSH, angle, by)))
        return attends

    def _denoised(self, x_BSH: Tensor, angle: Tensor, attends: Sequence[Attend], noise_key_BS: Tensor) -> Tensor:
        modulations = {level: self._modulations(_of_all(level, x_BSH.device)) for level in self.schedule.path[:-1]}
        wide = torch.promote_types(x_BSH.dtype, torch.float32)
        start = normal(noise_key_BS, x_BSH.shape[-1]).to(wide)
        estimate = self.schedule.denoised(
            start, lambda noisy, level: self._estimate(noisy.to(x_BSH.dtype), angle, attends, modulations[level])
        )
        return estimate.to(x_BSH.dtype)

    def _estimate(self, hidden: Tensor, angle: Tensor, attends: Sequence[Attend], by: Sequence[Tensor]) -> Tensor:
        with annotated("estimate"):
            for layer, layer_by, attend in zip(self.layers, by[:-1], attends, strict=True):
                hidden = self._advanced(cast(DenoiserLayer, layer), hidden, angle, layer_by, attend)
            shift, scale = by[-1].unbind(-2)
            return self.estimate(modulated(self.final_layernorm(hidden), shift, scale))

    def _modulations(self, level: Tensor) -> list[Tensor]:
        """Of each layer [..., 6, H] at int64 levels [...], and at the end the last norm's [..., 2, H]."""
        waves = _waves(level, self.schedule.levels, self.config.hidden_size).to(self.estimate.weight.dtype)
        layers = [cast(DenoiserLayer, layer).level_modulation(waves) for layer in self.layers]
        return [*layers, self.final_modulation(waves)]

    def _angle(self, position: Tensor) -> Tensor:
        head_dim = cast(int, self.config.kv_channels)
        frequency = grape.rope_frequencies(head_dim, self.config.rotary_base, position.device)
        return grape.rotation_angles(position, frequency).transpose(0, 1)

    def _advanced(self, layer: DenoiserLayer, hidden: Tensor, angle: Tensor, by: Tensor, attend: Attend) -> Tensor:
        if self.compiled_step and isinstance(attend, Stored):
            of_any_rows(hidden, angle, attend.position_B)
            of_any_columns(attend.stored_BC2GD)
            return part(DenoiserLayer.advance_one, True)(layer, hidden, angle, by, *attend)
        again = self.training and self.config.recomputation.granularity == "full"
        return (
            recomputed(layer.advance, hidden, angle, by, attend) if again else layer.advance(hidden, angle, by, attend)
        )


def _name(number: int) -> str:
    return f"layer_{number}"


def _of_all(level: int, device: torch.device) -> Tensor:
    """int64, of every position; filled by the device, which a copy of the host's number would wait for."""
    return torch.full((), level, dtype=torch.int64, device=device)


def _waves(level: Tensor, levels: int, size: int) -> Tensor:
    """fp32 [..., size] of int64 levels [...]: sines and cosines, from a radian a level to a radian over all."""
    place = torch.arange(-(-size // 2), device=level.device, dtype=torch.float32)
    angle = level.unsqueeze(-1) * torch.exp(place * (-math.log(levels) / len(place)))
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :size]


def _attended_whole(key: Tensor, value: Tensor, layout: SequenceLayout, backend: str, query: Tensor) -> Tensor:
    scale = query.shape[-1] ** -0.5
    return core_attention(
        query,
        key,
        value,
        layout=layout,
        window=None,
        alibi_slopes_H=None,
        sink_H=None,
        softmax_scale=scale,
        backend=backend,
    )
