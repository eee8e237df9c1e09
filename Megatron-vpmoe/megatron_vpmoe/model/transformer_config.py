"""The transformer configuration: Megatron-Core's, plus the fields of the vpMoE stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.recompute import Recomputation

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.config.schema_section import Section


class _SquaredReLU(Function):
    """relu(x)², whose derivative 2 relu(x) is of what is kept: two passes over memory, where autograd's takes four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        active = torch.relu(x)
        ctx.save_for_backward(active)
        return active.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (active,) = ctx.saved_tensors
        return (grad * active).mul_(2.0)


def squared_relu(x: Tensor) -> Tensor:
    """ReLU² of any shape, in the dtype of x (So et al. 2021, arXiv 2109.08668)."""
    return _SquaredReLU.apply(x)  # type: ignore[no-any-return]


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
    first_dense_layers: int = 1
    recomputation: Recomputation = field(default_factory=Recomputation)
    compiled: str = "off"
    experts_precision: str | None = None
    layer_type: str = "transformer"
    ssm_inner_size: int = 768
    ssm_state_size: int = 16
    ssm_conv_size: int = 4
    ssm_step_rank: int = 24
    diffusion_levels: int = 100
    ddim_steps: int = 10
    kv_lora_rank: int = 96
    qk_pos_emb_head_dim: int = 32
    memory_entries: int | None = None
    mixed: Mapping[str, VPTransformerConfig] = field(default_factory=dict)  # a mixture's experts, by name

    def is_global_layer(self, layer_number: int) -> bool:
        """Whether layer ``layer_number`` attends to the whole document (every ``window_attn_skip_freq``-th does)."""
        if self.window_size_tokens is None:
            return True
        frequency = self.window_attn_skip_freq
        return isinstance(frequency, int) and layer_number % frequency == 0

    def is_moe_layer(self, layer_number: int) -> bool:
        """Whether layer ``layer_number`` has routed experts."""
        return self.num_moe_experts is not None and layer_number > self.first_dense_layers


# Fields of ours that mean something else than upstream's of the same name, or have to be resolved.
_OTHERWISE = {"attention_backend", "window_size", "moe_token_dispatcher_type"}


def _by_name(section: Section) -> dict[str, Any]:
    """The fields of a section that mean what the field of this name means to VPTransformerConfig."""
    known = {field.name for field in fields(VPTransformerConfig)} - _OTHERWISE
    return {name: getattr(section, name) for name in type(section).model_fields if name in known}


def transformer_config(cfg: RunConfig) -> VPTransformerConfig:
    """Megatron-Core's view of a run's configuration. Allocates nothing."""
    model, moe, parallel, training = cfg.model, cfg.moe, cfg.parallel, cfg.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    return VPTransformerConfig(
        **_by_name(model),
        **_by_name(parallel),
        mixed=(
            {one.label: transformer_config(cfg.of_expert(one)) for one in model.mixture_experts or ()}
            if model.layer_type == "mixture"
            else {}
        ),
        normalization="RMSNorm",
        activation_func=squared_relu if model.activation == "squared_relu" else torch.nn.functional.silu,
        gated_linear_unit=model.activation == "swiglu",
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        window_size_tokens=model.window_size,
        attention_backend_name=model.attention_backend,
        num_moe_experts=moe.num_experts,
        **(_moe_fields(cfg) if moe.num_experts is not None else {}),
        expert_tensor_parallel_size=1,
        pipeline_dtype=dtype,
        batch_p2p_sync=False,  # a wait for the device after each exchange of stages, for older versions of torch
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
        compiled=training.compile,
        deterministic_mode=training.deterministic,
        cuda_graph_scope=[],
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
    )


def token_dispatcher(cfg: RunConfig) -> str:
    """Upstream's dispatcher of the routed experts, "auto" resolved; with one expert-parallel rank none is asked."""
    chosen = cfg.moe.moe_token_dispatcher_type
    return "alltoall" if chosen == "auto" else chosen


def _moe_fields(cfg: RunConfig) -> dict[str, Any]:
    moe, layers = cfg.moe, cfg.model.num_layers
    return {
        **_by_name(moe),
        "moe_layer_freq": [int(cfg.is_moe_layer(n)) for n in range(1, layers + 1)],
        "moe_token_dispatcher_type": token_dispatcher(cfg),
    }
