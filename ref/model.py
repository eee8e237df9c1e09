"""The whole student, slowly, from its formulas: token ids and weights in, logits out, in fp64.

Nothing of the product is used. A packed row is what it means to be: each document is run alone, from position 0, and
padding is not run at all, so there is no document mask here to get wrong. Attention is dense, heads one after another;
routing looks at one token after another. Weights come by the product's names; a weight that is present and never read
is an error (`Weights.unread`).

Formulas: RMSNorm arXiv 1910.07467, TPA 2501.06425, RoPE 2104.09864, GRAPE 2512.07805, ALiBi 2108.12409, value residual
2410.17897, ReLU² 2109.08668, SwiGLU 2002.05202, routing and balance loss DeepSeek-V3 2412.19437; the sink is GPT-OSS's.

Shapes: T tokens of one document, C hidden, H heads, G KV groups, D head dim, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FP64 = torch.float64


@dataclass(frozen=True)
class Student:
    """What the model is. ``window`` None: every layer is global. ``positions``: grape_m, grape_a, rope or none."""

    layers: int
    heads: int
    groups: int
    head_dim: int
    epsilon: float
    window: int | None
    global_every: int
    local_positions: str
    global_positions: str
    rotary_base: float
    frequency_scale: float
    tpa_ranks: tuple[int, int] | None
    tpa_factor_bias: bool
    qkv_bias: bool
    linear_bias: bool
    qk_norm: bool
    sink: bool
    value_residual: bool
    gated: bool
    tied: bool
    experts: int | None = None
    first_dense_layers: int = 1
    topk: int = 0
    router_groups: tuple[int, int] | None = None
    router_softmax: bool = False
    router_scale: float = 1.0
    expert_bias: bool = False
    shared_expert: bool = False
    balance_coefficient: float = 0.0

    def is_global(self, layer: int) -> bool:
        """Of layer 1, 2, ..."""
        return self.window is None or layer % self.global_every == 0


class Weights:
    """fp64 leaves of a state dict, by name; remembers which were read."""

    def __init__(self, state: Mapping[str, object]) -> None:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.leaf = {name: value.detach().to(FP64).requires_grad_() for name, value in tensors.items()}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self._read.add(name)
        return self.leaf[name]

    def unread(self) -> set[str]:
        """Names that no formula has asked for."""
        return set(self.leaf) - self._read


def logits(student: Student, weights: Weights, tokens: list[int], documents: list[int]) -> tuple[Tensor, Tensor]:
    """One packed row.

    Args:
        tokens: of every position.
        documents: the document of every position, -1 on padding; the positions of a document are contiguous.

    Returns:
        [S, V], zeros on padding, and the row's balance loss times its real tokens, summed over layers.
    """
    places: dict[int, list[int]] = {}
    for place, document in enumerate(documents):
        if document >= 0:
            places.setdefault(document, []).append(place)
    table = weights["embedding.word_embeddings.weight"]
    out = torch.zeros(len(tokens), table.shape[0], dtype=FP64)
    scores: dict[int, list[Tensor]] = {}
    for own in places.values():
        ids = torch.tensor([tokens[place] for place in own])
        hidden_TC = _document(student, weights, table[ids], scores)
        output = table if student.tied else weights["output_layer.weight"]
        out[own] = hidden_TC @ output.T
    balance = sum((_balance(student, torch.cat(of_layer)) for of_layer in scores.values()), torch.zeros((), dtype=FP64))
    return out, balance


def _document(student: Student, weights: Weights, x_TC: Tensor, scores: dict[int, list[Tensor]]) -> Tensor:
    first_value = None
    for layer in range(1, student.layers + 1):
        name = f"decoder.layers.{layer - 1}."
        normed = rms_norm(x_TC, weights[name + "input_layernorm.weight"], student.epsilon)
        attended, value = _attention(student, weights, layer, normed, first_value)
        first_value = value if first_value is None else first_value
        x_TC = x_TC + attended
        normed = rms_norm(x_TC, weights[name + "pre_mlp_layernorm.weight"], student.epsilon)
        if student.experts is None or layer <= student.first_dense_layers:
            x_TC = x_TC + _feed_forward(student, weights, name + "mlp.", normed)
        else:
            routed, score_TE = _experts(student, weights, name + "mlp.", normed)
            scores.setdefault(layer, []).append(score_TE)
            x_TC = x_TC + routed
    return rms_norm(x_TC, weights["decoder.final_layernorm.weight"], student.epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """w x / sqrt(mean x² + ε)."""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


def _linear(weights: Weights, name: str, x: Tensor, bias: bool) -> Tensor:
    out = x @ weights[name + ".weight"].T
    return out + weights[name + ".bias"] if bias else out


def _attention(
    student: Student, weights: Weights, layer: int, x_TC: Tensor, first_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    name, is_global = f"decoder.layers.{layer - 1}.self_attention.", student.is_global(layer)
    length = x_TC.shape[0]
    query, key, own_value = _project(student, weights, name, x_TC, tensor_product=not is_global)
    if student.qk_norm:
        query = rms_norm(query, weights[name + "q_layernorm.weight"], student.epsilon)
        key = rms_norm(key, weights[name + "k_layernorm.weight"], student.epsilon)
    positions = student.global_positions if is_global else student.local_positions
    if positions in ("grape_m", "rope"):
        j = torch.arange(student.head_dim // 2, dtype=FP64)
        frequency = student.rotary_base ** (-2 * j / student.head_dim)
        if positions == "grape_m":
            frequency = torch.exp(weights[name + "grape_log_freq"] / student.frequency_scale)
        query, key = rotate(query, frequency), rotate(key, frequency)
    value = own_value
    if student.value_residual and first_value is not None:
        mix = weights[name + "value_residual_scale"]
        value = mix * own_value + (1 - mix) * first_value

    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    reach = length if is_global or student.window is None else student.window
    seen = (j <= i) & (i - j < reach)
    heads = []
    for h in range(student.heads):
        g = h // (student.heads // student.groups)
        score = query[:, h] @ key[:, g].T / math.sqrt(student.head_dim)
        if positions == "grape_a":
            score = score - alibi_slope(h, student.heads) * (i - j)
        score = score.masked_fill(~seen, -math.inf)
        if student.sink:
            column = weights[name + "sink"][h].expand(length, 1)
            weight = torch.softmax(torch.cat([score, column], dim=1), dim=1)[:, :-1]
        else:
            weight = torch.softmax(score, dim=1)
        heads.append(weight @ value[:, g])
    return _linear(weights, name + "linear_proj", torch.cat(heads, dim=1), student.linear_bias), own_value


def _project(
    student: Student, weights: Weights, name: str, x_TC: Tensor, *, tensor_product: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, D], keys and values [T, G, D]."""
    heads, groups, dim = student.heads, student.groups, student.head_dim
    if student.tpa_ranks is None or not tensor_product:
        mixed = _linear(weights, name + "linear_qkv", x_TC, student.qkv_bias)
        return _by_head(mixed, heads, groups, dim)
    a = _linear(weights, name + "linear_tpa_a", x_TC, student.tpa_factor_bias)
    b = _linear(weights, name + "linear_tpa_b", x_TC, False)
    q_rank, rank = student.tpa_ranks
    out, begin_a, begin_b = [], 0, 0
    for rows, r in ((heads, q_rank), (groups, rank), (groups, rank)):
        factor_a = a[:, begin_a : begin_a + rows * r].reshape(-1, rows, r)
        factor_b = b[:, begin_b : begin_b + r * dim].reshape(-1, r, dim)
        out.append(torch.einsum("thr,trd->thd", factor_a, factor_b) / r)
        begin_a, begin_b = begin_a + rows * r, begin_b + r * dim
    query, key, value = out
    if student.qkv_bias:
        bias = _by_head(weights[name + "qkv_bias"].unsqueeze(0), heads, groups, dim)
        query, key, value = query + bias[0], key + bias[1], value + bias[2]
    return query, key, value


def _by_head(mixed: Tensor, heads: int, groups: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's mixed layout: for each group its queries, its key, its value, D columns each."""
    columns = list(mixed.split(dim, dim=1))
    query, key, value = [], [], []
    for _ in range(groups):
        query += [columns.pop(0) for _ in range(heads // groups)]
        key.append(columns.pop(0))
        value.append(columns.pop(0))
    return torch.stack(query, 1), torch.stack(key, 1), torch.stack(value, 1)


def rotate(x_THD: Tensor, frequency_F: Tensor) -> Tensor:
    """Token t turns each pair (x_j, x_{j + D/2}) by t · f_j."""
    angle = torch.arange(x_THD.shape[0], dtype=FP64)[:, None, None] * frequency_F
    first, second = x_THD.split(x_THD.shape[-1] // 2, dim=-1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def alibi_slope(head: int, heads: int) -> float:
    """2^(-8 (h+1) / H); for other than powers of two the ALiBi paper's interleave."""
    power = 2 ** math.floor(math.log2(heads))
    return 2 ** (-8 * (head + 1) / power) if head < power else 2 ** (-4 * (2 * (head - power) + 1) / power)


def _feed_forward(student: Student, weights: Weights, name: str, x_TC: Tensor) -> Tensor:
    inner = _activated(student, _linear(weights, name + "linear_fc1", x_TC, student.linear_bias))
    return _linear(weights, name + "linear_fc2", inner, student.linear_bias)


def _activated(student: Student, inner: Tensor) -> Tensor:
    if not student.gated:
        return torch.clamp(inner, min=0) ** 2
    gate, up = inner.split(inner.shape[-1] // 2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def _experts(student: Student, weights: Weights, name: str, x_TC: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output, and the scores of every token."""
    logit_TE = x_TC @ weights[name + "router.weight"].T
    sigmoid_TE = 1 / (1 + torch.exp(-logit_TE))
    bias_E = weights[name + "router.expert_bias"] if student.expert_bias else torch.zeros(logit_TE.shape[1])
    preference_TE = logit_TE if student.router_softmax else sigmoid_TE + bias_E
    rows = []
    for token, x_C in enumerate(x_TC):
        chosen = route(student, preference_TE[token].tolist())
        share = sigmoid_TE[token, chosen] / sigmoid_TE[token, chosen].sum()
        if student.router_softmax:
            share = torch.softmax(logit_TE[token, chosen], dim=0)
        out = torch.zeros_like(x_C)
        for e, weight in zip(chosen, share, strict=True):
            out = out + student.router_scale * weight * _one_expert(student, weights, name + "experts.", e, x_C)
        rows.append(out)
    out_TC = torch.stack(rows)
    if student.shared_expert:
        out_TC = out_TC + _feed_forward(student, weights, name + "shared_experts.", x_TC)
    return out_TC, torch.softmax(logit_TE, 1) if student.router_softmax else sigmoid_TE


def _one_expert(student: Student, weights: Weights, name: str, e: int, x_C: Tensor) -> Tensor:
    inner = weights[name + "fc1_weight"][e] @ x_C
    if student.linear_bias:
        inner = inner + weights[name + "fc1_bias"][e]
    out = weights[name + "fc2_weight"][e] @ _activated(student, inner)
    return out + weights[name + "fc2_bias"][e] if student.linear_bias else out


def route(student: Student, score: list[float]) -> list[int]:
    """The experts of a token: of the groups with the largest sums of their best experts, the best experts."""
    allowed = list(range(len(score)))
    if student.router_groups is not None:
        groups, kept = student.router_groups
        size, best = len(score) // groups, student.topk // kept
        worth = [sum(sorted(score[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
        chosen = sorted(range(groups), key=lambda g: worth[g])[-kept:]
        allowed = [e for e in allowed if e // size in chosen]
    return sorted(allowed, key=lambda e: score[e])[-student.topk :]


def _balance(student: Student, score_TE: Tensor) -> Tensor:
    """DeepSeek-V3 eq. 17-20 of one row, times its tokens: choices without bias and groups, scores normalised."""
    length, experts = score_TE.shape
    load = torch.zeros(experts, dtype=FP64)
    for row in score_TE.tolist():
        for e in sorted(range(experts), key=lambda e: row[e])[-student.topk :]:
            load[e] += 1
    share = (score_TE / score_TE.sum(1, keepdim=True)).mean(0)
    return length * student.balance_coefficient * (load * experts / (student.topk * length) * share).sum()
