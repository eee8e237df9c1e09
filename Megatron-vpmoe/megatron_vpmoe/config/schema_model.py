"""The sections that say what the network is: ``model`` and ``moe``. All sizes are per model, not per rank."""

from __future__ import annotations

from typing import Annotated, Literal

from megatron_vpmoe.config.schema_section import (
    Amount,
    Cardinal,
    Few,
    Fraction,
    PositiveFloat,
    Section,
    Several,
    Size,
    within,
)

PositionEmbedding = Literal["grape_m", "grape_a", "rope", "none"]


class MixtureExpert(Section):
    """One expert of a mixture: its kind and its depth; everything else is the model's."""

    layer_type: Literal["transformer", "state_space", "denoiser"]
    """What layers it has; it is called by this name too."""
    num_layers: Few
    """How many."""

    @property
    def label(self) -> str:
        """Its name."""
        return self.layer_type


class ModelSection(Section):
    """Geometry, positions and attention of the transformer."""

    num_layers: Few
    """Number of transformer layers."""
    hidden_size: Size
    """Width of the residual stream."""
    ffn_hidden_size: Size
    """Inner width of the dense feed-forward layers."""
    num_attention_heads: Size
    """Query heads per layer (H)."""
    num_query_groups: Size
    """Key/value heads per layer (G); each serves H / G query heads."""
    kv_channels: Size
    """Dimension of one attention head (d); even, since rotations act on pairs."""
    padded_vocab_size: Size
    """Rows of the embedding and of the output layer; must equal the dataset manifest's padded_vocab_size."""
    untie_embeddings_and_output_weights: bool = True
    """Give the output layer its own matrix instead of the embedding's."""
    add_bias_linear: bool = True
    """Biases on the attention output, the feed-forward layers and the experts (never on the router)."""
    add_qkv_bias: bool = True
    """Biases on queries, keys and values; in TPA layers added after the factor product."""
    qk_layernorm: bool = True
    """RMSNorm over the head dimension of queries and keys, before any rotation."""
    layernorm_epsilon: Fraction = 1e-6
    """Added to the mean square inside every RMSNorm."""
    activation: Literal["squared_relu", "swiglu"] = "squared_relu"
    """Feed-forward non-linearity: relu(x)^2, or the gated SwiGLU (which doubles the first matrix)."""
    init_method_std: Fraction = 0.02
    """Standard deviation of the initial weights."""
    softmax_type: Literal["learnable", "vanilla"] = "learnable"
    """"learnable" gives each head a sink logit in the softmax's denominator; "vanilla" has none."""
    window_size: Size | None = 128
    """Tokens that a local layer sees, the current one included; null: no window, every layer is global."""
    window_attn_skip_freq: Size = 4
    """Layer n (from 1) is global iff n is a multiple of this; idle without a window."""
    local_position_embedding: PositionEmbedding = "grape_m"
    """Positions in local layers: rotation by learned frequencies (GRAPE-M), RoPE, additive distance bias (GRAPE-A, the
    ALiBi slopes) or none."""
    global_position_embedding: PositionEmbedding = "grape_a"
    """The same for global layers."""
    rotary_base: PositiveFloat = 1_000_000.0
    """Base of the rotation frequencies of RoPE, and of GRAPE-M at initialisation."""
    grapem_log_freq_scale: PositiveFloat = 16.0
    """s in GRAPE-M: the parameter is s times the log-frequency, so s sets the frequencies' effective learning rate."""
    tpa: bool = True
    """Tensor product attention (factored Q, K, V) in local layers; false: grouped-query projections everywhere."""
    tpa_rank: Size = 2
    """R: number of factor pairs whose mean gives the keys, and likewise the values."""
    tpa_q_rank: Size = 4
    """R_q: number of factor pairs whose mean gives the queries."""
    tpa_factor_bias: bool = True
    """Bias on the head factors A of TPA, which lets TPA reproduce a plain projection exactly."""
    value_residual: bool = True
    """Mix layer 1's values into every later layer with one learned scalar a layer."""
    attention_backend: Literal["auto", "reference", "banded", "sdpa", "flex"] = "auto"
    """Attention implementation; "auto" takes the fastest that the layer and the device allow: banded (local) and sdpa
    (global) on a CPU, flex on a GPU."""
    layer_type: Literal["transformer", "state_space", "denoiser", "mixture"] = "transformer"
    """"transformer": attention and a feed-forward; "state_space": one S6 mixer, with a state of fixed size in the place
    of keys and values; "denoiser": plain transformer layers set by a level of noise, which estimate the next token's
    embedding and have no distribution over tokens; "mixture": mixture_experts, frozen, behind latent attention and a
    router (docs/nano_think.md)."""
    ssm_inner_size: Size = 768
    """Channels of a state space layer (I)."""
    ssm_state_size: Annotated[int, within(1, 64, "the scan's kernel holds no more in registers")] = 16
    """Numbers of state a channel (N)."""
    ssm_conv_size: Annotated[int, within(2, 64, "it would see further back than the state")] = 4
    """Taps of the causal convolution before the scan, the token's own included (K)."""
    ssm_step_rank: Size = 24
    """Rank of the projection that makes each channel's step (R)."""
    diffusion_levels: Size = 100
    """Levels of noise that a denoiser is trained at (T)."""
    ddim_steps: Size = 10
    """Steps of DDIM from pure noise to a denoiser's estimate; what validation measures, and what a mixture reads."""
    mixture_experts: Several[MixtureExpert] | None = None
    """Of a mixture, its experts in the order of the router's weights, as a list of {layer_type, num_layers}; a kind
    once at most."""
    kv_lora_rank: Size = 96
    """Of a mixture, the width of the latent that its attention makes keys and values of."""
    qk_pos_emb_head_dim: Size = 32
    """Of a mixture, the width of the rotated key that all heads of its attention share; even."""
    memory_entries: Size | None = None
    """Of a mixture, what each chunk of a text may read of data.store at most; null: it reads no store."""


class MoeSection(Section):
    """Experts and their router; everything here is idle when num_experts is null."""

    num_experts: Size | None = None
    """Routed experts a layer (E); null: a dense model."""
    moe_router_topk: Size = 4
    """Experts that each token visits."""
    moe_ffn_hidden_size: Size = 128
    """Inner width of one routed expert."""
    moe_shared_expert_intermediate_size: Size | None = 512
    """Inner width of the shared expert that every token visits; null: no shared expert."""
    first_dense_layers: Cardinal = 1
    """So many first layers have a dense feed-forward instead of experts; 0: none."""
    moe_router_load_balancing_type: Literal["seq_aux_loss", "none"] = "seq_aux_loss"
    """Balancing loss: over each sequence, or none."""
    moe_aux_loss_coeff: Amount = 1e-4
    """Weight of the balancing loss."""
    moe_router_score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    """How router logits become scores."""
    moe_router_topk_scaling_factor: PositiveFloat = 2.5
    """Factor on the normalised scores of the chosen experts."""
    moe_router_num_groups: Size | None = 8
    """Groups that the experts are divided into for group-limited routing; null: no groups."""
    moe_router_group_topk: Size | None = 4
    """Groups that a token may use; null together with moe_router_num_groups."""
    moe_router_enable_expert_bias: bool = True
    """Balance without a loss: a bias per expert that only takes part in the choice."""
    moe_router_bias_update_rate: Amount = 1e-3
    """Step of the expert bias after each iteration."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = "fp32"
    """Precision of the router's logits; null: the model's."""
    experts_precision: Literal["fp8_rowwise", "mxfp8"] | None = None
    """Format of the routed experts' products in training, through torchao (docs/performance.md): e4m3 with a scale a
    row, or a scale every 32 values. Sampling and evaluation take the plain weights. A GPU needs the kernels; without
    one the format's rounding is emulated. null: the run's own precision."""
    moe_token_dispatcher_type: Literal["auto", "alltoall", "allgather"] = "auto"
    """How tokens travel between expert-parallel ranks; "auto": alltoall. With one such rank they do not travel."""
