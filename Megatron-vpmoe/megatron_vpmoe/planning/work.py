"""What one micro-batch makes a device do, part by part, by formula: products, bytes and launches.

Products follow from the shapes. What else moves through memory and how many kernels that takes are widths times small
numbers, fitted to counted steps (`paper_step`) of the configurations at full scale; `tests/gpu_shape` holds them to it.

Letters: T tokens of a micro-batch on this rank, h hidden, Q all query heads, K all keys (values alike), V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_vpmoe.config.layer_geometry import mean_keys
from megatron_vpmoe.config.memory import LOGITS_CHUNK_BYTES
from megatron_vpmoe.config.parameters import parameter_sizes, projection_rows
from megatron_vpmoe.config.schema import RunConfig
from megatron_vpmoe.runtime.machines import Kind

_TILE = 128  # of FlexAttention
_ROUTED_ROW_BYTES = 1600  # sorting and placing one row: integers of 8 bytes
_WIDER = 1.5  # bytes of an fp32 model over those of a bf16 one, part of whose steps are in fp32 already
_COMPILED = {
    "layers": (layers := {"attention": 0.3, "norms and residuals": 0.4, "feed_forward": 0.4, "shared_expert": 0.4}),
    "step": {**layers, "router": 0.4, "experts": 0.6},
}
"""Assumed: what fusing leaves of the steps between products, in bytes and launches (``training.compile``)."""
_COMPILED_ON_CPU = 0.7  # of the same parts: of what the nano step saves there (docs/LOG.md, "compiled steps")
_CPU_COPIES = 11  # of queries, keys, values and output, in the order of tiles and back
_MASK_LAUNCHES = 90  # of a micro-batch, for each kind of layer


class Work(NamedTuple):
    """Of one part in one pass.

    Attributes:
        part: such as "attention".
        kind: of its products, or "memory".
        flops: of its products.
        moved: bytes read and written, each input and output once.
        launches: kernels.
        side: shortest side of the products.
        tensor: bytes of one of the tensors that move.
    """

    part: str
    kind: Kind
    flops: float
    moved: float
    launches: float
    side: float
    tensor: float


class Passes(NamedTuple):
    """The forward pass and the backward pass, without what is recomputed."""

    forward: list[Work]
    backward: list[Work]

    def __add__(self, other: Passes) -> Passes:  # type: ignore[override]
        return Passes(self.forward + other.forward, self.backward + other.backward)


NOTHING = Passes([], [])


class Shape(NamedTuple):
    """What the formulas of a rank share.

    Attributes:
        cfg: what one tensor-parallel rank holds (`geometry.tensor_parallel_rank`).
        tokens: T, of whole sequences.
        own: tokens of this rank's part of them, under sequence parallelism.
        size: bytes of a number in the dtype of the model.
        on_cpu: which attention, and in what precision matrices are orthogonalised.
        supervised: share of the positions whose loss is asked.
    """

    cfg: RunConfig
    tokens: int
    own: int
    size: int
    on_cpu: bool
    supervised: float = 1.0

    def moves(self, part: str, tokens: float, widths: tuple[float, float], launches: tuple[float, float]) -> Passes:
        """Steps without products: numbers of a token that move, forward and backward."""
        size = 2 if self.size == 2 else 2 * _WIDER
        left = _COMPILED.get(self.cfg.training.compile, {}).get(part, 1.0)
        left = _COMPILED_ON_CPU if self.on_cpu and left < 1.0 else left
        tensor = tokens * self.cfg.model.hidden_size * self.size
        made = [
            Work(part, "memory", 0.0, left * tokens * width * size, left * count, 1, tensor)
            for width, count in zip(widths, launches, strict=True)
        ]
        return Passes(made[:1], made[1:])

    def product(
        self, part: str, rows: float, inner: float, outer: float, *, kind: Kind = "product", copies: int = 1
    ) -> Passes:
        """[rows, inner] x [inner, outer], and the two products of its derivative; of ``copies``, rows are of all."""
        flops, numbers = 2.0 * rows * inner * outer, rows * (inner + outer) + copies * inner * outer
        side, tensor = min(rows / copies, inner, outer), rows * max(inner, outer) * self.size
        forward = Work(part, kind, flops, numbers * self.size, 1, side, tensor)
        return Passes([forward], [forward._replace(flops=2 * flops, moved=2 * numbers * self.size, launches=2)])


def layer_passes(shape: Shape, number: int) -> Passes:
    """Layer ``number`` (from 1)."""
    cfg, h, biased = shape.cfg, shape.cfg.model.hidden_size, shape.cfg.model.add_bias_linear
    around = shape.moves("norms and residuals", shape.own, ((4 + 3 * biased) * h, (5 + biased) * h), (4, 7))
    return around + _attention(shape, number) + (_sparse(shape) if cfg.is_moe_layer(number) else _dense(shape))


def _attention(shape: Shape, number: int) -> Passes:
    cfg, m, part = shape.cfg, shape.cfg.model, "attention"
    queries, keys = m.num_attention_heads * m.kv_channels, m.num_query_groups * m.kv_channels
    qkv, position, tokens = queries + 2 * keys, cfg.position_embedding(number), shape.tokens
    rows = projection_rows(cfg, number)
    found = shape.product(part, tokens, queries, m.hidden_size)
    for width in rows.values():
        found += shape.product(part, tokens, m.hidden_size, width)
    forward, backward = [3 * m.hidden_size + 4 * qkv, 4.0], [3 * m.hidden_size + 10 * qkv, 10.0]
    for holds, ahead, launched, back, launched_back in (
        (position in ("grape_m", "rope"), 8 * (queries + keys), 7, 8 * (queries + keys), 5),
        (position == "grape_m", 0, 5, 8 * (queries + keys), 10),
        (m.softmax_type == "learnable", 3 * queries, 1, 2 * queries, 3),
        (m.add_qkv_bias, 2 * qkv, 0, qkv, 2),
        (m.value_residual and number > 1, 8 * keys, 0, 16 * keys, 4),
        (cfg.is_tpa_layer(number), 2 * sum(rows.values()), 3, 9 * sum(rows.values()), 7),
    ):
        if holds:
            forward = [forward[0] + ahead, forward[1] + launched]
            backward = [backward[0] + back, backward[1] + launched_back]
    if cfg.is_tpa_layer(number):  # for each token a product of its own; its bytes are among those above
        flops = 2.0 * tokens * (queries * m.tpa_q_rank + 2 * keys * m.tpa_rank)
        tiny = Work(part, "small", flops, 0.0, 2, min(m.tpa_rank, m.tpa_q_rank), 0.0)
        found += Passes([tiny], [tiny._replace(flops=2 * flops, launches=4)])
    moved = shape.moves(part, tokens, (forward[0], backward[0]), (forward[1], backward[1]))
    return found + moved + _scores(shape, number, queries, qkv)


def seen_keys(cfg: RunConfig, number: int, *, on_cpu: bool) -> float:
    """Keys for which a kernel works, a token: those in sight, in whole tiles; each row is taken for one document."""
    length, window = cfg.data.seq_length, None if cfg.is_global_layer(number) else cfg.model.window_size
    if window is not None and window >= length:
        window = None
    if on_cpu:  # a window's block of queries sees its own keys and the block before; causal kernels skip the rest
        return mean_keys(length, None) if window is None else min(2 * window, length)
    tiles = -(-length // _TILE)
    reach = tiles if window is None else 1 + -(-(window - 1) // _TILE)
    return sum(min(number + 1, reach) for number in range(tiles)) * _TILE / tiles


def _scores(shape: Shape, number: int, queries: int, qkv: int) -> Passes:
    flops = 2 * 2.0 * shape.tokens * queries * seen_keys(shape.cfg, number, on_cpu=shape.on_cpu)
    side, tensor = shape.cfg.model.kv_channels, shape.tokens * qkv * shape.size
    ahead, back = shape.tokens * (qkv + queries) * shape.size, shape.tokens * 2 * (qkv + queries) * shape.size
    if shape.on_cpu:  # tiles, or repeated keys and values, are copied in and out
        ahead, back = _CPU_COPIES * ahead, _CPU_COPIES * back
    forward = Work("attention", "attention", flops, ahead, 1, side, tensor)
    return Passes([forward], [forward._replace(flops=2.5 * flops, moved=back, launches=4)])


def _feed_forward(shape: Shape, part: str, tokens: float, width: float, *, launches: tuple[float, float]) -> Passes:
    """Dense: two matrices and what is between them."""
    m, gated = shape.cfg.model, 2 if shape.cfg.model.activation == "swiglu" else 1
    of_biases = 2 * m.add_bias_linear * m.hidden_size
    between = (
        (7.0 * width, 13.0 * width + of_biases + 2 * m.add_bias_linear * width)
        if gated == 2
        else (4.0 * width, 5.0 * width + of_biases)
    )
    return (
        shape.product(part, tokens, m.hidden_size, gated * width)
        + shape.product(part, tokens, width, m.hidden_size)
        + shape.moves(part, tokens, between, launches)
    )


def _dense(shape: Shape) -> Passes:
    return _feed_forward(shape, "feed_forward", shape.tokens, shape.cfg.model.ffn_hidden_size, launches=(2, 4))


def _sparse(shape: Shape) -> Passes:
    cfg, moe, h = shape.cfg, shape.cfg.moe, shape.cfg.model.hidden_size
    experts, ranks, topk = moe.num_experts or 0, cfg.parallel.expert_model_parallel_size, moe.moe_router_topk
    tokens, width, gated = shape.own, moe.moe_ffn_hidden_size, 2 if cfg.model.activation == "swiglu" else 1
    rows, held = tokens * topk, experts // ranks  # as many rows come from other ranks as go to them
    narrow = 4 / (2 if shape.size == 2 else 2 * _WIDER)  # scores are fp32 in every model
    biased = cfg.model.add_bias_linear
    # Numbers of a row between the products, in units of its width: the activation, and the first bias of what is made.
    ahead, back = (9, 38) if gated == 2 else (8, 23)
    ahead, back = ahead + 5 * biased * gated, back + biased * gated
    launches = 9 + 2 * biased, (25 if gated == 2 else 21) + 2 * biased
    found = (
        shape.product("router", tokens, h, experts, kind="product" if shape.size == 2 else "wide")
        + shape.moves("router", tokens, (9 * narrow * experts, 21 * narrow * experts + 3 * h), (21, 30))
        + shape.product("experts", rows, h, gated * width, kind="experts", copies=held)
        + shape.product("experts", rows, width, h, kind="experts", copies=held)
        + shape.moves("experts", rows, (2 * h + ahead * width, 3 * h + back * width), launches)
    )
    # The gradient of the router's weight is of two parts of the logits'.
    again = found.backward[0]
    found += Passes([], [again._replace(flops=again.flops / 2, moved=again.moved / 2, launches=1)])
    placing = Work("dispatch", "memory", 0.0, rows * _ROUTED_ROW_BYTES, 8, 1, rows * 8.0)
    found += Passes([placing], [])
    if ranks > 1:
        found += shape.moves("dispatch", rows, (9 * h, 9 * h), (27, 12))
        found += shape.moves("experts", rows, (3 * h, 0), (1, 0))
        found += shape.product("experts", rows, held, h) if biased else NOTHING  # the second bias
    else:  # rows are gathered and added up here
        found += shape.moves("experts", rows, (1.25 * h, 3 * h), (2, 3))
        found += shape.product("experts", tokens, experts, h) if biased else NOTHING
    if moe.moe_shared_expert_intermediate_size:
        shared = moe.moe_shared_expert_intermediate_size
        found += _feed_forward(shape, "shared_expert", shape.tokens, shared, launches=(2, 5))
        found += shape.moves("shared_expert", shape.tokens, (0, 2 * h), (0, 0))
    return found


def around_layers(shape: Shape, layers: range) -> Passes:
    """Masks, and on the first stage the embedding."""
    cfg, m = shape.cfg, shape.cfg.model
    kinds = {cfg.is_global_layer(number) for number in layers}
    found = shape.moves("attention", 0, (0, 0), (len(kinds) * _MASK_LAUNCHES, 0))
    if layers.start == 1:
        found += shape.moves("embedding", shape.own, (2 * m.hidden_size, 4 * m.hidden_size), (2, 8))
        whole = float(m.padded_vocab_size * m.hidden_size * shape.size)
        found += Passes([], [Work("embedding", "memory", 0.0, whole, 0, 1, whole)])
    return found


def accumulation(shape: Shape, layers: range, held: float) -> Passes:
    """Adding ``held`` gradients to their fp32 buffers."""
    tensors, moved = len(parameter_sizes(shape.cfg, layers)), held * (shape.size + 8)
    return Passes([], [Work("gradients", "memory", 0.0, moved, tensors, 1, moved / max(1, tensors))])


def loss_passes(shape: Shape) -> Passes:
    """Output projection and cross-entropy in chunks of tokens, the projection's gradients included."""
    cfg, vocab, h = shape.cfg, shape.cfg.model.padded_vocab_size, shape.cfg.model.hidden_size
    softmaxes = 2 if cfg.training.objective == "topk_kd" and cfg.training.kd_temperature != 1 else 1
    of_token = vocab * (softmaxes * 4 + (shape.size if shape.size == 2 else 0))
    tokens = shape.supervised * shape.tokens
    chunks = max(1, math.ceil(tokens * of_token / LOGITS_CHUNK_BYTES["cpu" if shape.on_cpu else "cuda"]))
    flops, rows = 3 * 2.0 * tokens * vocab * h, tokens / chunks
    weights = chunks * vocab * h * (2 * shape.size + 8.0)
    logits = tokens * vocab * (32 if shape.size == 2 else 36)
    side, tensor = min(rows, h), rows * vocab * shape.size
    products = Work("loss", "product", flops, weights, 3 * chunks, side, tensor)
    read = Work("loss", "memory", 0.0, logits, 43 * chunks, 1, tensor)
    handed_on = Work("loss", "memory", 0.0, vocab * h * (1 + 3 * 8.0), 7, 1, vocab * h * 4.0)
    norm = shape.moves("norms and residuals", shape.own, (4 * h, 6 * h), (1, 2))
    return Passes([products, read], [handed_on]) + norm
