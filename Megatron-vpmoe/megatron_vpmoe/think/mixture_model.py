"""A mixture as a language model: what `VPModel` is to the trainer, the sampler and checkpoints.

Shapes: B rows, S positions, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.output import ModelOutput
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.counter import draw_key, random_bits
from megatron_vpmoe.think.decoding import Past
from megatron_vpmoe.think.diffuser import Diffuser
from megatron_vpmoe.think.mixture import ExpertMixture
from megatron_vpmoe.think.scale import Scale
from megatron_vpmoe.think.stack_expert import StackExpert

_NOISE = draw_key(0)


class MixtureModel(VPModel):
    """Embedding, mixture, tied output projection; one process holds all of it."""

    decoder: ExpertMixture

    def _layers(self, config: VPTransformerConfig) -> ExpertMixture:
        experts = {name: _expert(alone) for name, alone in config.mixed.items()}
        sizes = {"latent_width": config.kv_lora_rank, "rope_width": config.qk_pos_emb_head_dim}
        return ExpertMixture(config, experts, **sizes, memory=False)

    def forward(self, tokens_BS: Tensor, layout: SequenceLayout, computed: dict[int, Any] | None = None) -> ModelOutput:
        """One pass over packed rows.

        Args:
            tokens_BS: int64.
            layout: documents and positions.
            computed: receives under 0 what all parts keep of a single row, where it is to be continued.

        Returns:
            what an objective reads, with the weights of the experts.
        """
        past = None if computed is None else Past.of(layout)
        hidden_BSH, weight_BSE = self.decoder(
            self.embedded(tokens_BS),
            layout,
            past,
            scale=self.scale(),
            noise_key_BS=noise_key(tokens_BS, layout.position),
        )
        if computed is not None and past is not None:
            computed[0] = past.values
        return ModelOutput(hidden_BSH, self, weight_BSE)

    def embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., H]."""
        return self.embedding.word_embeddings.weight[tokens]

    def scale(self) -> Scale:
        """Of the embedding."""
        return Scale.of(self.embedding.word_embeddings.weight.detach())


def noise_key(token: Tensor, position: Tensor) -> Tensor:
    """int64 of int64 tokens and their positions: what the diffuser's noise behind them is drawn from.

    A hash of what training, packed rows and decoding know alike, whatever document the token stands in.
    """
    return random_bits(random_bits(torch.tensor(_NOISE, device=token.device), token), position)


def _expert(config: VPTransformerConfig) -> Module:
    if config.layer_type == "denoiser":
        return Diffuser(config, layers=config.num_layers, levels=config.diffusion_levels, steps=config.ddim_steps)
    return StackExpert(config)
