"""A mixture as a language model: what `VPModel` is to the trainer, the sampler and checkpoints.

Shapes: B rows, S positions, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.output import ModelOutput
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.counter import draw_key, random_bits
from megatron_vpmoe.runtime.ranges import annotated
from megatron_vpmoe.think.decoding import Entry, Past
from megatron_vpmoe.think.diffuser import Diffuser
from megatron_vpmoe.think.memory import Memory
from megatron_vpmoe.think.mixture import ExpertMixture
from megatron_vpmoe.think.recall import Recall
from megatron_vpmoe.think.scale import Scale
from megatron_vpmoe.think.stack_expert import StackExpert

_NOISE = draw_key(0)
_TOKEN, _ENTRIES, _COUNT = "recall.token", "recall.entries", "recall.count"


class MixtureModel(VPModel):
    """Embedding, mixture, tied output projection; one process holds all of it."""

    decoder: ExpertMixture
    recall: Recall | None = None
    """What its chunks are reminded of; None: of nothing."""

    def _layers(self, config: VPTransformerConfig) -> ExpertMixture:
        experts = {name: _expert(alone) for name, alone in config.mixed.items()}
        sizes = {"latent_width": config.kv_lora_rank, "rope_width": config.qk_pos_emb_head_dim}
        return ExpertMixture(config, experts, **sizes, memory=config.memory_entries is not None)

    def forward(self, tokens_BS: Tensor, layout: SequenceLayout, computed: dict[int, Any] | None = None) -> ModelOutput:
        """One pass over packed rows.

        Args:
            tokens_BS: int64.
            layout: documents and positions.
            computed: receives under 0 the ``entries`` of a single row, where it is to be continued.

        Returns:
            what an objective reads, with the weights of the experts.
        """
        past = None if computed is None else Past.of(layout)
        memory = None
        if self.recall is not None:
            with annotated("recall"):
                memory = self.recall.memory(tokens_BS, layout, self._table())
        keys = {"scale": self.scale(), "noise_key_BS": noise_key(tokens_BS, layout.position)}
        hidden_BSH, weight_BSE = self.decoder(self.embedded(tokens_BS), layout, past, **keys, memory=memory)
        if computed is not None and past is not None:
            if memory is not None:
                last = memory.chunk_BS[0, list(past.ends)]
                past.put(_TOKEN, tokens_BS[0])
                past.put(_ENTRIES, memory.entries_BGKH[0, last])
                past.put(_COUNT, memory.count_BG[0, last])
            computed[0] = past.values
        return ModelOutput(hidden_BSH, self, weight_BSE)

    def entries(self) -> dict[str, Entry]:
        """What decoding keeps: of all parts, and what the chunk at hand is reminded of, with the text so far."""
        kept = self.decoder.entries()
        if self.recall is not None:
            shape = (self.recall.entries, self.config.hidden_size)
            kept[_TOKEN] = Entry((), torch.int64, grows=True)
            kept |= {_ENTRIES: Entry(shape, torch.float32), _COUNT: Entry((), torch.int64)}
        return kept

    def step(
        self, token_B: Tensor, position_B: Tensor, state: dict[str, Tensor], scale: Scale
    ) -> tuple[Tensor, Tensor]:
        """What the output projection reads of one new token a row [B, H], and the weights of the experts [B, E].

        Args:
            token_B: int64.
            position_B: int64, where it stands in its document.
            state: of ``entries``, [B, ...]; goes on in place.
            scale: of the embedding.
        """
        memory = None
        if self.recall is not None:
            with annotated("recall"):
                memory = self._reminded(self.recall, token_B, position_B, state)
        keys = {"scale": scale, "noise_key_B": noise_key(token_B, position_B)}
        return self.decoder.step(self.embedded(token_B), position_B, state, **keys, memory=memory)

    def _reminded(self, recall: Recall, token_B: Tensor, position_B: Tensor, state: dict[str, Tensor]) -> Memory:
        """Of rows that begin a chunk what it is reminded of; of others what was found before."""
        text_BC = state[_TOKEN]
        text_BC[torch.arange(len(token_B), device=token_B.device), position_B] = token_B
        begin = [(row, at) for row, at in enumerate(position_B.tolist()) if at % recall.chunk == 0]
        prefixes = [text_BC[row, :at].cpu().numpy() for row, at in begin]
        for (row, _), found in zip(begin, recall.reminders(prefixes, self._table()), strict=True):
            state[_ENTRIES][row], state[_COUNT][row] = torch.from_numpy(found.entries), found.count
        own_B1 = torch.zeros_like(position_B).unsqueeze(1)
        return Memory(state[_ENTRIES].unsqueeze(1), state[_COUNT].unsqueeze(1), own_B1)

    def remember(self, ids: Sequence[int]) -> int:
        """Add a finished text to the store that is read, in memory: see ``Recall.remember``; 0 without a store."""
        return 0 if self.recall is None else self.recall.remember(np.asarray(ids, np.int64), self._table())

    def _table(self) -> Tensor:
        return self.embedding.word_embeddings.weight.detach()

    def embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., H]."""
        return self.embedding.word_embeddings.weight[tokens]

    def scale(self) -> Scale:
        """Of the embedding."""
        return Scale.of(self._table())


def noise_key(token: Tensor, position: Tensor) -> Tensor:
    """int64 of int64 tokens and their positions: what the diffuser's noise behind them is drawn from.

    A hash of what training, packed rows and decoding know alike, whatever document the token stands in.
    """
    return random_bits(random_bits(torch.full_like(token, _NOISE), token), position)


def _expert(config: VPTransformerConfig) -> Module:
    return Diffuser.of(config) if config.layer_type == "denoiser" else StackExpert(config)
