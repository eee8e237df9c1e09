"""Experts of unlike kinds behind one router: from embeddings to what the tied head reads.

Latent attention, with a memory if there is one, reads standardised embeddings; the router weighs the experts by the
running mean of its output; every expert reads that output, a stack of layers in the scale of plain embeddings, as it
was trained; and their outputs, each through an adapter, are summed by those weights. At first the attention adds
nothing and adapters change nothing: experts are what they were alone, to the bit.

Shapes: B rows, S positions, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.recompute import recomputed
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.ranges import annotated
from megatron_vpmoe.think.decoding import Entry, Past
from megatron_vpmoe.think.diffuser import Diffuser
from megatron_vpmoe.think.latent_attention import LatentAttention
from megatron_vpmoe.think.linear import linear
from megatron_vpmoe.think.memory import Memory
from megatron_vpmoe.think.router import ExpertRouter
from megatron_vpmoe.think.scale import Scale

_ATTENTION, _ROUTER = "latent_attention", "router"


class ExpertMixture(Module):
    """Latent attention, router, experts, adapters.

    Args:
        config: hidden size, heads, initialisation, recomputation: of experts, each as a whole.
        experts: by name, in the order of the weights; each [B, S, H] to [B, S, H] with ``entries`` and ``step``. They
            are not trained, and stay in evaluation mode.
        latent_width: of the attention.
        rope_width: of the attention.
        memory: whether there are entries of a memory to read.
    """

    def __init__(
        self,
        config: VPTransformerConfig,
        experts: Mapping[str, Module],
        *,
        latent_width: int,
        rope_width: int,
        memory: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        sizes = {"latent_width": latent_width, "rope_width": rope_width}
        self.latent_attention = LatentAttention(config, **sizes)
        self.router = ExpertRouter(config, experts=len(experts))
        self.experts = ModuleDict(experts)
        self.adapters = ModuleDict(
            {name: linear(config.hidden_size, config.hidden_size, config, torch.nn.init.eye_) for name in experts}
        )
        if memory:  # last, so that all else is drawn as without one
            self.latent_attention.read_memory()

    def forward(
        self,
        x_BSH: Tensor,
        layout: SequenceLayout,
        past: Past | None = None,
        *,
        scale: Scale,
        noise_key_BS: Tensor,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the head reads [B, S, H], and the weights of the experts, fp32 or wider [B, S, E].

        Args:
            x_BSH: embeddings.
            layout: documents and positions.
            past: receives what all parts keep of a single row, where it is to be continued.
            scale: of the embedding.
            noise_key_BS: int64, a hash of what names a position; for the diffuser.
            memory: what the positions may read besides.
        """
        pasts = {name: None if past is None else Past(past.spans) for name in self._parts()}
        standard_BSH = scale.standardised(x_BSH)
        with annotated(_ATTENTION):
            read_BSH = self.latent_attention(standard_BSH, layout, pasts[_ATTENTION], memory=memory)
        with annotated(_ROUTER):
            weight_BSE = self.router(read_BSH, layout, pasts[_ROUTER])
        plain_BSH = scale.moved(x_BSH, read_BSH - standard_BSH)
        outs = []
        for name, expert in self.experts.items():
            own = pasts[f"experts.{name}"]
            with annotated(f"experts.{name}"):
                if isinstance(expert, Diffuser):
                    outs.append(self._run(expert, read_BSH, layout, own, noise_key_BS=noise_key_BS))
                else:
                    outs.append(self._run(expert, plain_BSH, layout, own))
        if past is not None:
            for part, own in pasts.items():
                for name, value in cast(Past, own).values.items():
                    past.put(f"{part}.{name}", value)
        return self._fused(outs, weight_BSE), weight_BSE

    def entries(self) -> dict[str, Entry]:
        """What decoding keeps of all parts."""
        return {
            f"{part}.{name}": entry
            for part, module in self._parts().items()
            for name, entry in module.entries().items()
        }

    def step(
        self,
        x_BH: Tensor,
        position_B: Tensor,
        state: dict[str, Tensor],
        *,
        scale: Scale,
        noise_key_B: Tensor,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``forward`` for one new token a row: [B, H] and [B, E].

        Args:
            x_BH: its embedding.
            position_B: int64, where it stands in its document.
            state: of ``entries``, [B, ...]; goes on in place.
            scale: of the embedding.
            noise_key_B: int64, as in ``forward``.
            memory: what the token may read, with S = 1.
        """
        own = {part: {name: state[f"{part}.{name}"] for name in one.entries()} for part, one in self._parts().items()}
        standard_BH = scale.standardised(x_BH)
        with annotated(_ATTENTION):
            read_BH = self.latent_attention.step(standard_BH, position_B, own[_ATTENTION], memory=memory)
        with annotated(_ROUTER):
            weight_BE = self.router.step(read_BH, position_B, own[_ROUTER])
        plain_BH = scale.moved(x_BH, read_BH - standard_BH)
        outs = []
        for name, expert in self.experts.items():
            state_of = own[f"experts.{name}"]
            with annotated(f"experts.{name}"):
                if isinstance(expert, Diffuser):
                    outs.append(expert.step(read_BH, position_B, state_of, noise_key_B=noise_key_B))
                else:
                    outs.append(cast(Any, expert).step(plain_BH, position_B, state_of))
        return self._fused(outs, weight_BE), weight_BE

    @property
    def layers(self) -> tuple[Module, ...]:
        """What upstream's schedules tell the number of a micro-batch, which nothing here asks for."""
        return ()

    def train(self, mode: bool = True) -> ExpertMixture:
        """As every module's; but for the experts."""
        super().train(mode)
        self.experts.eval()
        return self

    def _run(self, expert: Module, *given: object, **keywords: Tensor) -> Tensor:
        again = self.training and self.config.recomputation.granularity == "full"
        return recomputed(expert, *given, **keywords) if again else expert(*given, **keywords)

    def _parts(self) -> dict[str, Any]:
        """What keeps something from token to token, by its name."""
        experts = {f"experts.{name}": expert for name, expert in self.experts.items()}
        return {_ATTENTION: self.latent_attention, _ROUTER: self.router, **experts}

    def _fused(self, outs: list[Tensor], weight: Tensor) -> Tensor:
        with annotated("adapters"):
            adapted = [adapter(out) for adapter, out in zip(self.adapters.values(), outs, strict=True)]
            shares = weight.to(adapted[0].dtype).unsqueeze(-1).unbind(-2)
            return torch.stack([share * out for share, out in zip(shares, adapted, strict=True)]).sum(0)
