"""How large a configuration is: parameters, FLOPs and cache bytes, by arithmetic alone (nothing is allocated).

The letters are the model's: h hidden size, H query heads, G key/value groups, d head dimension, R and R_q ranks of the
tensor products, E experts, V padded vocabulary, S sequence length, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from megatron_vpmoe.config.parameters import attention_sizes, feed_forward_sizes, projection_rows, state_space_sizes
from megatron_vpmoe.config.schema import RunConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model by part, summed over layers and experts.

    ``active`` counts what one token touches: of the routed experts only the top-k. A tied output layer counts once.
    """

    parts: dict[str, int]
    routed_experts_active: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters that one token touches."""
        return self.total - self.parts["routed experts"] + self.routed_experts_active

    @property
    def active_without_embeddings(self) -> int:
        """``active`` less the embedding and the output layer."""
        return self.active - self.parts["embedding"] - self.parts["output layer"]


def _feed_forward(cfg: RunConfig, width: int) -> int:
    return sum(feed_forward_sizes(cfg, width).values())


def attention_parameters(cfg: RunConfig, layer_number: int) -> int:
    """Parameters of the attention of layer ``layer_number`` (from 1), its QK-norms and scalars included."""
    return sum(attention_sizes(cfg, layer_number).values())


def parameter_count(cfg: RunConfig, layers: range | None = None) -> ParameterCount:
    """Parameters of the model that ``cfg`` describes, equal to those of the built model.

    Args:
        cfg: the run.
        layers: count the pipeline stage of these layer numbers (from 1) alone; None: the whole model.
    """
    m, moe = cfg.model, cfg.moe
    layers = range(1, m.num_layers + 1) if layers is None else layers
    is_first, is_last = layers.start == 1, layers.stop == m.num_layers + 1
    owns_output = is_last and (m.untie_embeddings_and_output_weights or not is_first)  # a tied one is a copy there
    sparse = sum(cfg.is_moe_layer(n) for n in layers)
    experts, expert = moe.num_experts or 0, _feed_forward(cfg, moe.moe_ffn_hidden_size)
    shared = moe.moe_shared_expert_intermediate_size
    vocabulary = m.padded_vocab_size * m.hidden_size
    around = {"embedding": vocabulary if is_first else 0, "output layer": vocabulary if owns_output else 0}
    if m.layer_type == "state_space":
        mixers = {"state space": len(layers) * sum(state_space_sizes(cfg).values()), "routed experts": 0}
        norms = {"norms": (len(layers) + is_last) * m.hidden_size}
        return ParameterCount(around | mixers | norms, routed_experts_active=0)
    parts = {
        **around,
        "attention, local": sum(attention_parameters(cfg, n) for n in layers if not cfg.is_global_layer(n)),
        "attention, global": sum(attention_parameters(cfg, n) for n in layers if cfg.is_global_layer(n)),
        "dense feed-forward": (len(layers) - sparse) * _feed_forward(cfg, m.ffn_hidden_size),
        "router": sparse * experts * m.hidden_size,
        "shared experts": sparse * _feed_forward(cfg, shared) if shared else 0,
        "routed experts": sparse * experts * expert,
        "norms": (2 * len(layers) + is_last) * m.hidden_size,
    }
    if m.layer_type == "denoiser":
        h = m.hidden_size
        parts["levels and estimate"] = (6 * len(layers) + 2 * is_last) * h * (h + 1) + is_last * h * h
    return ParameterCount(parts, routed_experts_active=sparse * min(moe.moe_router_topk, experts) * expert)


def tensor_parallel_rank(cfg: RunConfig) -> RunConfig:
    """The configuration of what one tensor-parallel rank holds: its heads, groups, channels and part of the vocabulary.

    What every rank holds whole (TPA's B factors, norms, router, experts) does not change. ``parallel`` stays as it is.
    """
    ranks, m, shared = (
        cfg.parallel.tensor_model_parallel_size,
        cfg.model,
        cfg.moe.moe_shared_expert_intermediate_size,
    )
    split = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "padded_vocab_size")
    model = m.model_copy(update={name: getattr(m, name) // ranks for name in split})
    moe = cfg.moe.model_copy(update={"moe_shared_expert_intermediate_size": shared // ranks if shared else shared})
    return cfg.model_copy(update={"model": model, "moe": moe})


def stage_layers(cfg: RunConfig) -> list[range]:
    """The layer numbers (from 1) of each pipeline stage: Megatron's division, of a configuration without problems."""
    p, size = cfg.parallel, cfg.parallel.pipeline_model_parallel_size
    first, last = p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage
    middle = size - (first is not None) - (last is not None)
    even = (cfg.model.num_layers - (first or 0) - (last or 0)) // middle if middle else 0
    counts = [even] * size
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    ends = list(accumulate(counts))
    return [range(end - count + 1, end + 1) for count, end in zip(counts, ends, strict=True)]


def mean_keys(seq_length: int, window: int | None) -> float:
    """Keys that a query sees on average in one causal document of ``seq_length`` tokens."""
    if window is None or window >= seq_length:
        return (seq_length + 1) / 2
    return window - window * (window - 1) / (2 * seq_length)


Keys = Callable[[int | None], float]
"""Of a layer's window (None: it has none): the keys that a token sees on average."""


def forward_flops_per_token(cfg: RunConfig, seq_length: int | None = None, *, keys: Keys | None = None) -> float:
    """FLOPs (a multiply-add is two) of one token's forward pass, every part of the model included.

    Counts matrix products: projections, factor products of TPA, scores and weighted values (only keys in sight),
    feed-forward, router, output layer.

    Args:
        cfg: the run.
        seq_length: of the documents; None: a row, which for packed rows is an upper bound.
        keys: in place of ``seq_length``, as they were counted in real documents.
    """
    keys = keys or partial(mean_keys, cfg.data.seq_length if seq_length is None else seq_length)
    layers = layer_geometries(cfg)
    return output_layer_flops(cfg) + sum(
        layer.product_flops + layer.flops_per_key * keys(layer.window) for layer in layers
    )


def training_flops_per_token(cfg: RunConfig, seq_length: int | None = None, *, keys: Keys | None = None) -> float:
    """Model FLOPs of one trained token: forward, and twice that backward; arguments as above.

    Recomputation is not counted, as is usual for model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B).
    """
    return 3 * forward_flops_per_token(cfg, seq_length, keys=keys)


def kv_cache_bytes_per_token(cfg: RunConfig) -> int:
    """Bytes that one generated token adds to the cache of dense keys and values over all layers (2 G d each)."""
    return sum(layer.cache_bytes for layer in layer_geometries(cfg))


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
    """Every layer, from the first."""
    return [layer_geometry(cfg, number) for number in range(1, cfg.model.num_layers + 1)]


def layer_geometry(cfg: RunConfig, layer_number: int) -> LayerGeometry:
    """Kind and costs of layer ``layer_number`` (from 1)."""
    m, moe = cfg.model, cfg.moe
    if m.layer_type == "state_space":
        return _state_space_geometry(cfg, layer_number)
    sparse = cfg.is_moe_layer(layer_number)
    if sparse:
        experts, shared = moe.num_experts or 0, moe.moe_shared_expert_intermediate_size
        expert = _feed_forward(cfg, moe.moe_ffn_hidden_size)
        always = experts * m.hidden_size + (_feed_forward(cfg, shared) if shared else 0)
        total, active = always + experts * expert, always + moe.moe_router_topk * expert
    else:
        total = active = _feed_forward(cfg, m.ffn_hidden_size)
    heads_width = m.num_attention_heads * m.kv_channels
    passes = 2 if m.layer_type == "denoiser" else 1  # of the clean tokens, and of the noisy ones
    return LayerGeometry(
        number=layer_number,
        window=None if cfg.is_global_layer(layer_number) else m.window_size,
        tensor_product=cfg.is_tpa_layer(layer_number),
        position=cfg.position_embedding(layer_number),
        sparse=sparse,
        attention_parameters=attention_parameters(cfg, layer_number),
        feed_forward_parameters=total,
        active_feed_forward_parameters=active,
        norm_parameters=(2 + (passes - 1) * 6 * (m.hidden_size + 1)) * m.hidden_size,  # a level sets a denoiser's
        product_flops=passes * 2 * (_attention_products(cfg, layer_number) + _feed_forward_products(cfg, sparse)),
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


def output_layer_flops(cfg: RunConfig) -> int:
    """Forward FLOPs per token of the projection to the vocabulary, or to a denoiser's estimate."""
    m = cfg.model
    return 2 * (m.hidden_size if m.layer_type == "denoiser" else m.padded_vocab_size) * m.hidden_size
