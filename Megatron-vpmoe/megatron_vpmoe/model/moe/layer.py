"""The feed-forward of a layer with experts: where they all lie on this rank, nothing is dispatched or waited for."""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_vpmoe.model.compilation import part
from megatron_vpmoe.model.moe.experts import StackedExperts
from megatron_vpmoe.model.moe.real_tokens import RealTokens
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.ranges import annotated


class VPMoELayer(MoELayer):
    """Upstream's layer; with one expert-parallel rank its dispatcher is left out.

    There rows are gathered by expert and added up by token inside of :class:`StackedExperts`, in shapes that depend on
    the number of tokens alone. Over more ranks upstream's dispatchers move tokens, and ask the device how many.
    """

    config: VPTransformerConfig

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: RealTokens | Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, H] -> [S, B, H], routed and shared experts added up, and None: biases are inside.

        Args:
            hidden_states: tokens, of this rank's part of a sequence.
            intermediate_tensors: upstream's, for partly captured graphs.
            padding_mask: bool [B, S], True on padding; or what is known of it already.
        """
        router = cast(VPMoERouter, self.router)
        real = RealTokens(padding_mask, router.topk) if isinstance(padding_mask, Tensor) else padding_mask
        if self.ep_group.size() > 1:
            padding_mask = None if real is None else real.padding_BS
            return cast(tuple[Tensor, None], super().forward(hidden_states, intermediate_tensors, padding_mask))
        compiled = self.training and self.config.compiled == "step"
        shared, score_SBE = self.shared_experts_compute(hidden_states), router.scores(hidden_states)
        real = real or RealTokens.all_of(score_SBE, router.topk)
        chosen_TK, computed = router.chosen(score_SBE, real), part(VPMoELayer.computed, compiled)
        if compiled:
            router.make(real, score_SBE.dtype)
        out, loss = computed(self, hidden_states, shared, score_SBE, chosen_TK, real)
        return router.with_loss(out, loss), None

    def computed(
        self, hidden_SBH: Tensor, shared_SBH: Tensor | None, score_SBE: Tensor, chosen_TK: Tensor, real: RealTokens
    ) -> tuple[Tensor, Tensor | None]:
        """What follows from the choice, of tensors alone: all experts' outputs added up, and the balance loss."""
        router, experts = cast(VPMoERouter, self.router), cast(StackedExperts, self.experts)
        with annotated("router"):
            weight_TK, loss = router.weighed(score_SBE, chosen_TK, real)
        numbers = None if torch.compiler.is_compiling() else real.numbers
        out = experts.of_tokens(hidden_SBH.flatten(0, 1), chosen_TK, weight_TK, numbers).view_as(hidden_SBH)
        return out if shared_SBH is None else out + shared_SBH, loss
