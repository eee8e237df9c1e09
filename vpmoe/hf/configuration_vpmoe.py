"""Configuration of vpMoE for ``transformers``; copied into every exported directory, so it imports nothing of ours.

Every rung from the dense student to the mixture of experts is one model type; the fields carry the names of the
training configuration's sections ``model`` and ``moe``.
"""

from transformers import PreTrainedConfig


class VpMoeConfig(PreTrainedConfig):
    """The architecture of one rung.

    ``layer_types`` (full_attention or sliding_attention, one a layer) and ``sliding_window`` drive the cache; they
    follow from ``window_size`` (tokens that a local layer sees, the current one included; None: no local layers) and
    ``window_attn_skip_freq`` (layer n, from 1, is global iff n is a multiple). ``activation`` is squared_relu or
    swiglu, positions are grape_m, grape_a, rope or none, ``softmax_type`` is learnable (a sink a head) or vanilla.
    """

    model_type = "vpmoe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers reads it so

    vocab_size: int = 201088
    hidden_size: int = 1024
    intermediate_size: int = 512
    num_hidden_layers: int = 80
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    activation: str = "squared_relu"
    linear_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = True
    softmax_type: str = "learnable"
    window_size: int | None = 128
    window_attn_skip_freq: int = 4
    local_position_embedding: str = "grape_m"
    global_position_embedding: str = "grape_a"
    rotary_base: float = 1_000_000.0
    grapem_log_freq_scale: float = 16.0
    tpa: bool = True
    tpa_rank: int = 2
    tpa_q_rank: int = 4
    tpa_factor_bias: bool = True
    value_residual: bool = True
    num_experts: int | None = None
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    shared_expert_intermediate_size: int | None = 512
    first_dense_layers: int = 1
    router_score_function: str = "sigmoid"
    router_scaling_factor: float = 2.5
    router_groups: int | None = 8
    router_group_topk: int | None = 4
    router_expert_bias: bool = True
    router_dtype: str | None = "float32"
    tie_word_embeddings: bool = False
    use_cache: bool = True
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        """Derive what the cache reads."""
        self.layer_types = [
            "full_attention" if self.is_global_layer(number) else "sliding_attention"
            for number in range(1, self.num_hidden_layers + 1)
        ]
        self.sliding_window = self.window_size if "sliding_attention" in self.layer_types else None
        super().__post_init__(**kwargs)

    def is_global_layer(self, number: int) -> bool:
        """Whether layer ``number`` (from 1) sees the whole sequence."""
        return self.window_size is None or number % self.window_attn_skip_freq == 0

    def is_moe_layer(self, number: int) -> bool:
        """Whether layer ``number`` (from 1) has routed experts."""
        return self.num_experts is not None and number > self.first_dense_layers
