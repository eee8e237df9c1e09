"""Multi-head latent attention with a memory (DeepSeek-AI 2024, arXiv 2405.04434, 2.1): keys and values from one latent.

A token leaves a normed latent c and a rotated key that all heads share, and nothing else: L + R numbers. What a head
reads of c, its key without position and its value, are linear in it; in decoding those linears go to the query and to
the output instead, so that past tokens are read as they are kept. An entry of memory is a latent with no rotated key:
it has no position.

Shapes: B rows, S positions, H hidden, N heads, D head dim, L latent width, R rotated width, E entries of memory,
C columns of the decoding state.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import Module

from megatron_vpmoe.model.attention import grape
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.norm import RMSNorm
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.think.decoding import Entry, Past
from megatron_vpmoe.think.linear import linear
from megatron_vpmoe.think.memory import Memory

_LATENT = "latent"


class LatentAttention(Module):
    """Pre-norm attention added to what comes in; at first it adds nothing.

    Args:
        config: heads, head dim, hidden size, rotation base, epsilon, initialisation.
        latent_width: L.
        rope_width: R, even.

    Attributes:
        linear_memory: makes latents of entries; None until there is a memory (``read_memory``).
    """

    def __init__(self, config: VPTransformerConfig, *, latent_width: int, rope_width: int) -> None:
        super().__init__()
        self.config, self.latent_width, self.rope_width = config, latent_width, rope_width
        self.heads, self.head_dim = config.num_attention_heads, cast(int, config.kv_channels)
        hidden, inner, draw = config.hidden_size, self.heads * self.head_dim, config.init_method
        self.input_layernorm = RMSNorm(config, hidden, config.layernorm_epsilon)
        self.linear_query = linear(hidden, inner + self.heads * rope_width, config, draw)
        self.linear_latent = linear(hidden, latent_width, config, draw)
        self.linear_rope_key = linear(hidden, rope_width, config, draw)
        self.linear_memory: Module | None = None
        self.latent_layernorm = RMSNorm(config, latent_width, config.layernorm_epsilon)
        self.linear_key = linear(latent_width, inner, config, draw)
        self.linear_value = linear(latent_width, inner, config, draw)
        self.linear_proj = linear(inner, hidden, config, None)

    def read_memory(self) -> None:
        """Have it read entries of a memory: what that takes is drawn now."""
        self.linear_memory = linear(self.config.hidden_size, self.latent_width, self.config, self.config.init_method)

    def forward(
        self, x_BSH: Tensor, layout: SequenceLayout, past: Past | None = None, *, memory: Memory | None = None
    ) -> Tensor:
        """x and what it attends to, [B, S, H].

        Args:
            x_BSH: hidden states.
            layout: documents and positions.
            past: receives latents and rotated keys of a single row, where it is to be continued.
            memory: what the positions may read besides; where one may read nothing, not a bit differs from None.
        """
        content, turned, kept_BSX = self._projected(x_BSH, layout.position)
        if past is not None:
            past.put(_LATENT, kept_BSX.squeeze(0))
        latent_BSL, rope_key_BSR = kept_BSX.split([self.latent_width, self.rope_width], -1)
        key_BNSD, value_BNSD = self._of_heads(latent_BSL)
        score = (_wide(content) @ _wide(key_BNSD).mT) + (_wide(turned) @ _wide(rope_key_BSR).unsqueeze(1).mT)
        score = self._scaled(score, layout.visible(None))
        recalled = None
        if memory is not None and memory.entries_BGKH.numel():
            key_BNED, recalled_BNED = self._of_heads(self._recalled(memory))
            seen = _wide(content) @ _wide(key_BNED).mT
            recalled = self._scaled(seen, memory.visible().unsqueeze(1)), _wide(recalled_BNED)
        taken_BNSD = _taken(score, _wide(value_BNSD), recalled)
        return x_BSH + self.linear_proj(taken_BNSD.to(x_BSH.dtype).transpose(1, 2).flatten(2))

    def entries(self) -> dict[str, Entry]:
        """What decoding keeps: L + R numbers a token."""
        return {_LATENT: Entry((self.latent_width + self.rope_width,), self.linear_latent.weight.dtype, grows=True)}

    def step(
        self, x_BH: Tensor, position_B: Tensor, state: dict[str, Tensor], *, memory: Memory | None = None
    ) -> Tensor:
        """[B, H] for one new token a row.

        Args:
            x_BH: hidden states.
            position_B: int64, where it stands in its document.
            state: latents and rotated keys [B, C, L + R], C above every position; the new token's is written.
            memory: what the token may read, with S = 1.
        """
        position_B1, stored_BCX = position_B.unsqueeze(1), state[_LATENT]
        content, turned, kept_B1X = self._projected(x_BH.unsqueeze(1), position_B1)
        stored_BCX[torch.arange(x_BH.shape[0], device=x_BH.device), position_B] = kept_B1X.squeeze(1)
        # q (W c) = (q W) c: of each head the latents themselves are keys and values.
        key_NDL, value_NDL = (one.weight.unflatten(0, (self.heads, -1)) for one in (self.linear_key, self.linear_value))
        absorbed_BN1L = _wide(content) @ _wide(key_NDL)
        stored_B1CX = _wide(stored_BCX).unsqueeze(1)
        visible_BC = torch.arange(stored_BCX.shape[1], device=x_BH.device) <= position_B1
        score = torch.cat([absorbed_BN1L, _wide(turned)], -1) @ stored_B1CX.mT
        score = self._scaled(score, visible_BC[:, None, None])
        recalled = None
        if memory is not None and memory.entries_BGKH.numel():
            recalled_B1EL = _wide(self._recalled(memory)).unsqueeze(1)
            recalled = self._scaled(absorbed_BN1L @ recalled_B1EL.mT, memory.visible().unsqueeze(1)), recalled_B1EL
        taken_BN1L = _taken(score, stored_B1CX[..., : self.latent_width], recalled)
        taken_BND = (taken_BN1L @ _wide(value_NDL).mT).squeeze(2)
        return x_BH + self.linear_proj(taken_BND.to(x_BH.dtype).flatten(1))

    def _projected(self, x_BSH: Tensor, position_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries without position [B, N, S, D] and rotated [B, N, S, R], and what a token leaves [B, S, L + R]."""
        normed = self.input_layernorm(x_BSH)
        frequency = grape.rope_frequencies(self.rope_width, self.config.rotary_base, x_BSH.device)
        angle_BS1F = grape.rotation_angles(position_BS, frequency).transpose(0, 1)
        query_BSNX = self.linear_query(normed).unflatten(-1, (self.heads, -1))
        content, turned = query_BSNX.split([self.head_dim, self.rope_width], -1)
        rope_key = self.linear_rope_key(normed).unsqueeze(2)
        turned, rope_key = grape.rotate_all([turned, rope_key], angle_BS1F)
        latent = self.latent_layernorm(self.linear_latent(normed))
        return content.transpose(1, 2), turned.transpose(1, 2), torch.cat([latent, rope_key.squeeze(2)], -1)

    def _of_heads(self, latent_BSL: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without position and values, [B, N, S, D] each."""
        both = (one(latent_BSL).unflatten(-1, (self.heads, -1)) for one in (self.linear_key, self.linear_value))
        key, value = (one.transpose(1, 2) for one in both)
        return key, value

    def _recalled(self, memory: Memory) -> Tensor:
        """Entries as latents [B, E, L]."""
        if self.linear_memory is None:
            raise ValueError("a memory, and the attention is built without one")
        entries = memory.entries_BGKH.flatten(1, 2).to(self.linear_latent.weight.dtype)
        return self.latent_layernorm(self.linear_memory(entries))

    def _scaled(self, score: Tensor, visible: Tensor) -> Tensor:
        return (score * (self.head_dim + self.rope_width) ** -0.5).masked_fill(~visible, -torch.inf)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _taken(score: Tensor, value: Tensor, recalled: tuple[Tensor, Tensor] | None) -> Tensor:
    """softmax over both sets of scores, of both sets of values; the second may be masked whole.

    Sums are taken apart and then added, so that a set with nothing to read adds a zero and changes no bit of the other.
    """
    peak = score.detach().amax(-1, keepdim=True)
    if recalled is not None:
        peak = peak.maximum(recalled[0].detach().amax(-1, keepdim=True))
    weight = torch.exp(score - peak)
    total, taken = weight.sum(-1, keepdim=True), weight @ value
    if recalled is not None:
        weight = torch.exp(recalled[0] - peak)
        total, taken = total + weight.sum(-1, keepdim=True), taken + weight @ recalled[1]
    return taken / total
