"""The shared expert: a dense feed-forward beside the routed ones, with biases, which upstream's refuses."""

from __future__ import annotations

import copy
import functools
from typing import cast

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from megatron_vpmoe.model.compilation import part
from megatron_vpmoe.model.recompute import recomputed
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.ranges import annotated


class VPSharedExpert(MLP):
    """Every token's expert, of width ``moe_shared_expert_intermediate_size``.

    A dense layer's feed-forward of that width converts into it exactly, biases included.
    """

    config: VPTransformerConfig

    def __init__(
        self, config: VPTransformerConfig, submodules: MLPSubmodules, pg_collection: ProcessGroupCollection, gate: bool
    ) -> None:
        # Upstream's MLP takes the second matrix's width from the configuration, whatever width it is handed.
        own_config = copy.copy(config)
        own_config.ffn_hidden_size = cast(int, config.moe_shared_expert_intermediate_size)
        super().__init__(
            config=own_config,
            submodules=submodules,
            ffn_hidden_size=own_config.ffn_hidden_size,
            tp_group=pg_collection.tp,
        )

    def forward(self, hidden_SBH: Tensor) -> Tensor:  # type: ignore[override]
        """[S, B, H] -> [S, B, H], bias included."""
        with annotated("shared_expert"):
            return self._forward(hidden_SBH)

    def _forward(self, hidden_SBH: Tensor) -> Tensor:
        again = self.training and self.config.recomputation.recomputes("shared_experts")
        run = functools.partial(part(VPSharedExpert.whole, self.training and self.config.compiled != "off"), self)
        return recomputed(run, hidden_SBH) if again else run(hidden_SBH)

    def whole(self, hidden_SBH: Tensor) -> Tensor:
        """``forward``, unmarked."""
        out, bias = super().forward(hidden_SBH)
        return out if bias is None else out + bias
