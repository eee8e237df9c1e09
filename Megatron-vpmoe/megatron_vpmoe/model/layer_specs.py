"""The declaration of every layer: which parts it is built from, for the dense and the sparse stack alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules, RouterBuilder
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_vpmoe.model.attention.self_attention import VPSelfAttention, VPSelfAttentionSubmodules
from megatron_vpmoe.model.block import VPTransformerLayer
from megatron_vpmoe.model.moe.experts import StackedExperts
from megatron_vpmoe.model.moe.layer import VPMoELayer
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.model.moe.shared_expert import VPSharedExpert
from megatron_vpmoe.model.norm import RMSNorm
from megatron_vpmoe.model.tensor_parallel import ColumnLinear, RowLinear
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.think.state_space import StateSpaceLayer

_LINEARS = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)


def layer_spec(config: VPTransformerConfig, layer_number: int) -> ModuleSpec:
    """Layer ``layer_number`` (1-based): attention of its kind, and a dense or routed feed-forward; or a state space."""
    if config.layer_type == "state_space":
        return ModuleSpec(module=StateSpaceLayer)
    qk_norm = RMSNorm if config.qk_layernorm else None
    attention = ModuleSpec(
        module=VPSelfAttention,
        submodules=VPSelfAttentionSubmodules(
            linear_qkv=ColumnLinear,
            linear_proj=RowLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    if config.is_moe_layer(layer_number):
        mlp = ModuleSpec(
            module=VPMoELayer,
            submodules=MoESubmodules(
                experts=ModuleSpec(module=StackedExperts),
                shared_experts=ModuleSpec(module=VPSharedExpert, submodules=_LINEARS),
                router=cast(RouterBuilder, VPMoERouter),
            ),
        )
    else:
        mlp = ModuleSpec(module=MLP, submodules=_LINEARS)
    return ModuleSpec(
        module=VPTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
        ),
    )


def block_spec(config: VPTransformerConfig, layers: Iterable[int]) -> TransformerBlockSubmodules:
    """The layers of these (global, 1-based) numbers, and the final norm, which upstream builds on the last stage."""
    specs = [layer_spec(config, number) for number in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=ModuleSpec(module=RMSNorm))
