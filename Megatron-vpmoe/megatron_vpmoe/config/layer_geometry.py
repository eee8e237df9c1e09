"""What each layer of a configuration costs: parameters, FLOPs of a token, bytes that decoding keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_vpmoe.config.parameters import (
    attention_sizes,
    feed_forward_sizes,
    mixture_sizes,
    projection_rows,
    state_space_sizes,
)
from megatron_vpmoe.config.schema import RunConfig

LATENT_ATTENTION = "latent attention"


def mean_keys(seq_length: int, window: int | None) -> float:
    """Keys that a query sees on average in one causal document of ``seq_length`` tokens."""
    if window is None or window >= seq_length:
        return (seq_length + 1) / 2
    return window - window * (window - 1) / (2 * seq_length)


def feed_forward_parameters(cfg: RunConfig, width: int) -> int:
    """Parameters of a feed-forward network of inner width ``width``."""
    return sum(feed_forward_sizes(cfg, width).values())


def attention_parameters(cfg: RunConfig, layer_number: int) -> int:
    """Parameters of the attention of layer ``layer_number`` (from 1), its QK-norms and scalars included."""
    return sum(attention_sizes(cfg, layer_number).values())


@dataclass(frozen=True)
class LayerGeometry:
    """One layer: its kind, and what it costs. Parameters are those of the whole layer, over all experts and ranks."""

    number: int
    window: int | None
    """Tokens that it sees; None: the whole document (a global layer)."""
    tensor_product: bool
    """TPA projections, not grouped-query ones."""
    position: str
    """grape_m, grape_a, rope or none."""
    sparse: bool
    """Routed experts, not one dense feed-forward network."""
    attention_parameters: int
    feed_forward_parameters: int
    """Of a sparse layer: router, shared expert and all routed experts."""
    active_feed_forward_parameters: int
    """Of the routed experts only the top-k."""
    norm_parameters: int
    product_flops: int
    """Forward FLOPs per token of all matrix products but those of queries with keys and of weights with values."""
    flops_per_key: int
    """Forward FLOPs per token and key in sight: 2 H d for the score, 2 H d for the weighted value."""
    cache_bytes: int
    """Bytes of one token's keys and values."""
    state_size: int | None = None
    """Of a state space layer, the numbers that it keeps of all tokens before; its mixer counts as attention."""
    part: str = ""
    """Of a mixture: the expert that the layer is of, or "latent attention", which counts router and adapters too."""

    @property
    def is_global(self) -> bool:
        """Whether it attends without a window."""
        return self.window is None

    @property
    def parameters(self) -> int:
        """All parameters of the layer."""
        return self.attention_parameters + self.feed_forward_parameters + self.norm_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token touches."""
        return self.attention_parameters + self.active_feed_forward_parameters + self.norm_parameters

    def attention_flops(self, seq_length: int) -> float:
        """Forward FLOPs per token of scores and weighted values, averaged over a document of ``seq_length``."""
        return self.flops_per_key * mean_keys(seq_length, self.window)

    def flops(self, seq_length: int) -> float:
        """Forward FLOPs per token, averaged over a document of ``seq_length``."""
        return self.product_flops + self.attention_flops(seq_length)

    def cached_tokens(self, seq_length: int) -> int:
        """Tokens of a context that stay in the cache: of a local layer the last W - 1."""
        return seq_length if self.window is None else min(seq_length, self.window - 1)


def layer_geometries(cfg: RunConfig) -> list[LayerGeometry]:
    """Every layer, from the first; of a mixture its attention, and then those of one expert after another."""
    if cfg.model.layer_type == "mixture":
        return _mixture_geometries(cfg)
    return [layer_geometry(cfg, number) for number in range(1, cfg.model.num_layers + 1)]


def layer_geometry(cfg: RunConfig, layer_number: int, *, runs: int = 1) -> LayerGeometry:
    """Kind and costs of layer ``layer_number`` (from 1).

    Args:
        cfg: the run.
        layer_number: of the layer.
        runs: of a denoiser's noisy tokens through it, beside that of the clean ones.
    """
    m, moe = cfg.model, cfg.moe
    if m.layer_type == "state_space":
        return _state_space_geometry(cfg, layer_number)
    sparse = cfg.is_moe_layer(layer_number)
    if sparse:
        experts, shared = moe.num_experts or 0, moe.moe_shared_expert_intermediate_size
        expert = feed_forward_parameters(cfg, moe.moe_ffn_hidden_size)
        always = experts * m.hidden_size + (feed_forward_parameters(cfg, shared) if shared else 0)
        total, active = always + experts * expert, always + moe.moe_router_topk * expert
    else:
        total = active = feed_forward_parameters(cfg, m.ffn_hidden_size)
    heads_width = m.num_attention_heads * m.kv_channels
    products = _attention_products(cfg, layer_number) + _feed_forward_products(cfg, sparse)
    norms, passes = 2, 1
    if m.layer_type == "denoiser":
        norms += 6 * (m.hidden_size + 1)  # which a level sets
        # Noisy tokens leave no keys and values; clean ones, in the last layer, nothing else.
        keys_values, is_last = 2 * heads_width * m.hidden_size, layer_number == m.num_layers
        products = runs * (products - keys_values) + (keys_values if is_last else products)
        passes = runs + (not is_last)
    return LayerGeometry(
        number=layer_number,
        window=None if cfg.is_global_layer(layer_number) else m.window_size,
        tensor_product=cfg.is_tpa_layer(layer_number),
        position=cfg.position_embedding(layer_number),
        sparse=sparse,
        attention_parameters=attention_parameters(cfg, layer_number),
        feed_forward_parameters=total,
        active_feed_forward_parameters=active,
        norm_parameters=norms * m.hidden_size,
        product_flops=2 * products,
        flops_per_key=passes * 2 * 2 * heads_width,
        cache_bytes=2 * m.num_query_groups * m.kv_channels * (2 if cfg.training.bf16 else 4),
    )


def _state_space_geometry(cfg: RunConfig, layer_number: int) -> LayerGeometry:
    """A mixer: projections, convolution, and per number of state a decay, what enters and what is read."""
    m, sizes = cfg.model, state_space_sizes(cfg)
    products = sum(size for name, size in sizes.items() if name.endswith("_proj.weight")) + sizes["conv_weight"]
    return LayerGeometry(
        number=layer_number,
        window=None,
        tensor_product=False,
        position="none",
        sparse=False,
        attention_parameters=sum(sizes.values()),
        feed_forward_parameters=0,
        active_feed_forward_parameters=0,
        norm_parameters=m.hidden_size,
        product_flops=2 * (products + 3 * m.ssm_inner_size * m.ssm_state_size),
        flops_per_key=0,
        cache_bytes=0,
        state_size=m.ssm_inner_size * (m.ssm_state_size + m.ssm_conv_size - 1),
    )


def _mixture_geometries(cfg: RunConfig) -> list[LayerGeometry]:
    """As it decodes and trains: noisy tokens go through a denoiser's layers once for each step of DDIM."""
    found = [_latent_geometry(cfg)]
    for expert in cfg.model.mixture_experts or ():
        alone = cfg.of_expert(expert)
        layers = (
            layer_geometry(alone, number, runs=cfg.model.ddim_steps) for number in range(1, expert.num_layers + 1)
        )
        found += [replace(one, part=expert.label) for one in layers]
    return [replace(one, number=number) for number, one in enumerate(found, 1)]


def _latent_geometry(cfg: RunConfig) -> LayerGeometry:
    """Attention over latents, with the router and the adapters in the place of a feed-forward; and the estimates."""
    m, sizes = cfg.model, mixture_sizes(cfg)
    of_attention = {name: size for name, size in sizes.items() if name.startswith("decoder.latent_attention.")}
    norms = sum(size for name, size in of_attention.items() if "layernorm" in name)
    attention = sum(of_attention.values()) - norms
    behind = sum(size for name, size in sizes.items() if name.startswith(("decoder.router.", "decoder.adapters.")))
    estimates = m.ddim_steps * m.hidden_size**2 * any(one.layer_type == "denoiser" for one in m.mixture_experts or ())
    return LayerGeometry(
        number=1,
        window=None,
        tensor_product=False,
        position="rope",
        sparse=False,
        attention_parameters=attention,
        feed_forward_parameters=behind,
        active_feed_forward_parameters=behind,
        norm_parameters=norms,
        product_flops=2 * (attention + behind + estimates),
        flops_per_key=2 * m.num_attention_heads * (2 * m.kv_channels + m.qk_pos_emb_head_dim),
        cache_bytes=(m.kv_lora_rank + m.qk_pos_emb_head_dim) * (2 if cfg.training.bf16 else 4),
        part=LATENT_ATTENTION,
    )


def _attention_products(cfg: RunConfig, layer_number: int) -> int:
    """Multiply-adds per token of the projections and of TPA's factor products."""
    m = cfg.model
    rows = projection_rows(cfg, layer_number)
    heads_width = m.num_attention_heads * m.kv_channels
    count = (sum(rows.values()) + heads_width) * m.hidden_size
    if cfg.is_tpa_layer(layer_number):
        count += heads_width * m.tpa_q_rank + 2 * m.num_query_groups * m.kv_channels * m.tpa_rank
    return count


def _feed_forward_products(cfg: RunConfig, sparse: bool) -> int:
    """Multiply-adds per token of router, experts and feed-forward networks."""
    m, moe = cfg.model, cfg.moe
    gated = 3 if m.activation == "swiglu" else 2
    if not sparse:
        return gated * m.ffn_hidden_size * m.hidden_size
    width = moe.moe_router_topk * moe.moe_ffn_hidden_size + (moe.moe_shared_expert_intermediate_size or 0)
    return (gated * width + (moe.num_experts or 0)) * m.hidden_size
