"""How large a configuration is: parameters, FLOPs and cache bytes, by arithmetic alone (nothing is allocated).

The letters are the model's: h hidden size, H query heads, G key/value groups, d head dimension, R and R_q ranks of the
tensor products, E experts, V padded vocabulary, S sequence length, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from megatron_vpmoe.config.layer_geometry import (
    LATENT_ATTENTION,
    LayerGeometry,
    attention_parameters,
    feed_forward_parameters,
    layer_geometries,
    mean_keys,
)
from megatron_vpmoe.config.parameters import (
    EMBEDDING,
    OUTPUT,
    is_trained,
    mixture_sizes,
    parameter_sizes,
    state_space_sizes,
)
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
    experts, expert = moe.num_experts or 0, feed_forward_parameters(cfg, moe.moe_ffn_hidden_size)
    shared = moe.moe_shared_expert_intermediate_size
    vocabulary = m.padded_vocab_size * m.hidden_size
    around = {"embedding": vocabulary if is_first else 0, "output layer": vocabulary if owns_output else 0}
    if m.layer_type == "mixture":
        return ParameterCount(around | _mixture_parts(cfg), routed_experts_active=0)
    if m.layer_type == "state_space":
        mixers = {"state space": len(layers) * sum(state_space_sizes(cfg).values()), "routed experts": 0}
        norms = {"norms": (len(layers) + is_last) * m.hidden_size}
        return ParameterCount(around | mixers | norms, routed_experts_active=0)
    parts = {
        **around,
        "attention, local": sum(attention_parameters(cfg, n) for n in layers if not cfg.is_global_layer(n)),
        "attention, global": sum(attention_parameters(cfg, n) for n in layers if cfg.is_global_layer(n)),
        "dense feed-forward": (len(layers) - sparse) * feed_forward_parameters(cfg, m.ffn_hidden_size),
        "router": sparse * experts * m.hidden_size,
        "shared experts": sparse * feed_forward_parameters(cfg, shared) if shared else 0,
        "routed experts": sparse * experts * expert,
        "norms": (2 * len(layers) + is_last) * m.hidden_size,
    }
    if m.layer_type == "denoiser":
        h = m.hidden_size
        parts["levels and estimate"] = (6 * len(layers) + 2 * is_last) * h * (h + 1) + is_last * h * h
    return ParameterCount(parts, routed_experts_active=sparse * min(moe.moe_router_topk, experts) * expert)


def _mixture_parts(cfg: RunConfig) -> dict[str, int]:
    parts: dict[str, int] = {part: 0 for part in (LATENT_ATTENTION, "router", "adapters", "experts")}
    for name, size in mixture_sizes(cfg).items():
        if name != EMBEDDING:
            parts[name.split(".")[1].replace("_", " ")] += size
    return {**parts, "routed experts": 0}


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
    """Model FLOPs of one trained token: forward, and twice that backward, for what enters a product and for its weight;
    arguments as above.

    Of a layer that is frozen whole there is none for weights. One of which a part is trained counts as trained, and
    what lies before the first trained parameter as if a gradient went through it. Recomputation is not counted, as is
    usual for model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    keys = keys or partial(mean_keys, cfg.data.seq_length if seq_length is None else seq_length)
    return output_training_flops(cfg) + sum(
        (2 + _is_trained(cfg, layer)) * layer.product_flops + 3 * layer.flops_per_key * keys(layer.window)
        for layer in layer_geometries(cfg)
    )


def _is_trained(cfg: RunConfig, layer: LayerGeometry) -> bool:
    """Whether anything of a layer is; of a mixture attention, router and adapters alone ever are."""
    if cfg.training.train_only is None:
        return True
    if cfg.model.layer_type == "mixture":
        return layer.part == LATENT_ATTENTION
    number, begin = layer.number, f"decoder.layers.{layer.number - 1}."
    names = parameter_sizes(cfg, range(number, number + 1))
    return any(name.startswith(begin) and is_trained(cfg, name) for name in names)


def kv_cache_bytes_per_token(cfg: RunConfig) -> int:
    """Bytes that one generated token adds to the cache of dense keys and values over all layers (2 G d each)."""
    return sum(layer.cache_bytes for layer in layer_geometries(cfg))


def output_training_flops(cfg: RunConfig) -> int:
    """Model FLOPs of ``output_layer_flops`` and its backward pass."""
    own = OUTPUT if cfg.model.untie_embeddings_and_output_weights else EMBEDDING
    name = "decoder.estimate.weight" if cfg.model.layer_type == "denoiser" else own
    return (2 + is_trained(cfg, name)) * output_layer_flops(cfg)


def output_layer_flops(cfg: RunConfig) -> int:
    """Forward FLOPs per token of the projection to the vocabulary, or to a denoiser's estimate."""
    m = cfg.model
    return 2 * (m.hidden_size if m.layer_type == "denoiser" else m.padded_vocab_size) * m.hidden_size
