"""The transformer configuration: Megatron-Core's, plus the fields of the vpMoE stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vpmoe.model.recompute import Recomputation

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """ReLU² of any shape, in the dtype of x (So et al. 2021, arXiv 2109.08668)."""
    return torch.relu(x).square()


@dataclass
class VPTransformerConfig(TransformerConfig):
    """Megatron-Core's configuration plus ours. All lengths are in tokens; layer numbers are 1-based and global.

    ``window_attn_skip_freq`` and ``softmax_type`` are upstream's own fields; ``window_size_tokens`` counts the current
    token, where upstream's ``window_size`` tuple would be (W-1, 0).
    """

    window_size_tokens: int | None = None
    local_position_embedding: str = "grape_m"
    global_position_embedding: str = "grape_a"
    rotary_base: float = 1_000_000.0
    grapem_log_freq_scale: float = 16.0
    tpa: bool = True
    tpa_rank: int = 2
    tpa_q_rank: int = 4
    tpa_factor_bias: bool = True
    value_residual: bool = True
    attention_backend_name: str = "auto"
    first_layer_dense: bool = True
    recomputation: Recomputation = field(default_factory=Recomputation)

    def is_global_layer(self, layer_number: int) -> bool:
        """Whether layer ``layer_number`` attends to the whole document (every ``window_attn_skip_freq``-th does)."""
        if self.window_size_tokens is None:
            return True
        frequency = self.window_attn_skip_freq
        return isinstance(frequency, int) and layer_number % frequency == 0

    def is_moe_layer(self, layer_number: int) -> bool:
        """Whether layer ``layer_number`` has routed experts."""
        return self.num_moe_experts is not None and not (layer_number == 1 and self.first_layer_dense)


def transformer_config(cfg: RunConfig) -> VPTransformerConfig:
    """Megatron-Core's view of a run's configuration. Allocates nothing."""
    model, moe, parallel, training = cfg.model, cfg.moe, cfg.parallel, cfg.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    return VPTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=squared_relu if model.activation == "squared_relu" else torch.nn.functional.silu,
        gated_linear_unit=model.activation == "swiglu",
        bias_activation_fusion=False,
        init_method_std=model.init_method_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_type=model.softmax_type,
        window_size_tokens=model.window_size,
        window_attn_skip_freq=model.window_attn_skip_freq,
        local_position_embedding=model.local_position_embedding,
        global_position_embedding=model.global_position_embedding,
        rotary_base=model.rotary_base,
        grapem_log_freq_scale=model.grapem_log_freq_scale,
        tpa=model.tpa,
        tpa_rank=model.tpa_rank,
        tpa_q_rank=model.tpa_q_rank,
        tpa_factor_bias=model.tpa_factor_bias,
        value_residual=model.value_residual,
        attention_backend_name=model.attention_backend,
        num_moe_experts=moe.num_experts,
        first_layer_dense=moe.first_layer_dense,
        **(_moe_fields(cfg) if moe.num_experts is not None else {}),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        expert_tensor_parallel_size=1,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        pipeline_dtype=dtype,
        # What a stage has sent is kept for its graph alone.
        deallocate_pipeline_outputs=parallel.pipeline_model_parallel_size > 1,
        params_dtype=dtype,
        bf16=training.bf16,
        calculate_per_token_loss=True,
        # Not in upstream's fields of these names: its reentrant checkpoints would count the router's tokens twice.
        recomputation=Recomputation(
            granularity=training.recompute_granularity,
            method=training.recompute_method or "uniform",
            num_layers=training.recompute_num_layers or 1,
            modules=tuple(training.recompute_modules or ("core_attn",)),
        ),
        cuda_graph_scope=[],
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
    )


def token_dispatcher(cfg: RunConfig) -> str:
    """The dispatcher of the routed experts, "auto" resolved."""
    if cfg.moe.moe_token_dispatcher_type != "auto":
        return cfg.moe.moe_token_dispatcher_type
    # With one rank alltoall copies every token once more than allgather, for nothing.
    return "allgather" if cfg.parallel.expert_model_parallel_size == 1 else "alltoall"


def _moe_fields(cfg: RunConfig) -> dict[str, Any]:
    moe, layers = cfg.moe, cfg.model.num_layers
    return {
        "moe_layer_freq": [0 if n == 1 and moe.first_layer_dense else 1 for n in range(1, layers + 1)],
        "moe_ffn_hidden_size": moe.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "moe_router_topk": moe.moe_router_topk,
        "moe_router_load_balancing_type": moe.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": moe.moe_aux_loss_coeff,
        "moe_router_score_function": moe.moe_router_score_function,
        "moe_router_topk_scaling_factor": moe.moe_router_topk_scaling_factor,
        "moe_router_num_groups": moe.moe_router_num_groups,
        "moe_router_group_topk": moe.moe_router_group_topk,
        "moe_router_enable_expert_bias": moe.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": moe.moe_router_bias_update_rate,
        "moe_router_dtype": moe.moe_router_dtype,
        "moe_token_dispatcher_type": token_dispatcher(cfg),
        "moe_permute_fusion": moe.moe_permute_fusion,
        "moe_router_fusion": moe.moe_router_fusion,
    }
