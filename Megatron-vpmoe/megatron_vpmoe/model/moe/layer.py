"""The feed-forward of a layer with experts: where they all lie on this rank, nothing is dispatched or waited for."""

from __future__ import annotations

from typing import cast

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_vpmoe.model.moe.experts import StackedExperts
from megatron_vpmoe.model.moe.router import RealTokens, VPMoERouter


class VPMoELayer(MoELayer):
    """Upstream's layer; with one expert-parallel rank its dispatcher is left out.

    There rows are gathered by expert and added up by token inside of :class:`StackedExperts`, in shapes that depend on
    the number of tokens alone. Over more ranks upstream's dispatchers move tokens, and ask the device how many.
    """

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: RealTokens | Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, H] -> [S, B, H], routed and shared experts added up, and None: biases are inside.

        Args:
            hidden_states: tokens, of this rank's part of a sequence.
            intermediate_tensors: upstream's, for partly captured graphs.
            padding_mask: bool [B, S], True on padding; or what is known of it already.
        """
        router, experts = cast(VPMoERouter, self.router), cast(StackedExperts, self.experts)
        real = RealTokens(padding_mask, router.topk) if isinstance(padding_mask, Tensor) else padding_mask
        if self.ep_group.size() > 1:
            padding_mask = None if real is None else real.padding_BS
            return cast(tuple[Tensor, None], super().forward(hidden_states, intermediate_tensors, padding_mask))
        shared = self.shared_experts_compute(hidden_states)
        weight_TK, chosen_TK = router.choose(hidden_states, real)
        out = experts.of_tokens(hidden_states.flatten(0, 1), chosen_TK, weight_TK).view_as(hidden_states)
        return out if shared is None else out + shared, None
