"""The parts of vpMoE's layers for ``transformers``: norm, attention, feed-forward, router, experts.

Copied into every exported directory, so it imports nothing of ours. Parameters have the training model's names;
attention is dense and exact, experts run one after another: made to be read and to be right.

Shapes: B rows, S new tokens, T past and new tokens, K keys that a layer holds, C hidden, H heads, G KV groups, D head
dim, N tokens, E experts.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .configuration_vpmoe import VpMoeConfig


class VpMoeTokens(NamedTuple):
    """Where the tokens of a forward pass stand.

    Attributes:
        real_BT: False on padding.
        rank_BT: real tokens before each one in its row; what a row's padding stands between makes no difference.
        position_BS: of the new tokens in their documents, from 0.
        first_BS: rank of the first token of each new token's document.
    """

    real_BT: torch.Tensor
    rank_BT: torch.Tensor
    position_BS: torch.Tensor
    first_BS: torch.Tensor

    def seen(self, keys, window):
        """Which of a layer's keys each new token sees [B, S, K], and how many tokens before it each is.

        Keys are the row's last ones, or all and then slots not written yet (static caches).

        Raises:
            ValueError: a key inside the window is gone from the cache, since padding took its place there.
        """
        total, new = self.rank_BT.shape[1], self.first_BS.shape[1]
        gone, unwritten = max(total - keys, 0), max(keys - total, 0)
        rank_BS1 = self.rank_BT[:, -new:, None]
        oldest_BS1 = self.first_BS[:, :, None]
        if window is not None:
            oldest_BS1 = torch.maximum(oldest_BS1, rank_BS1 - window + 1)
        real_BS1 = self.real_BT[:, -new:, None]
        if gone and (real_BS1 & (self.rank_BT[:, gone - 1, None, None] >= oldest_BS1)).any():
            raise ValueError(
                "attention_mask has padding after real tokens, and the cache of a local layer holds it in place of "
                "tokens inside the window; pad on the left"
            )
        real_BK, rank_BK = (functional.pad(x[:, gone:], (0, unwritten)) for x in (self.real_BT, self.rank_BT))
        distance_BSK = rank_BS1 - rank_BK[:, None, :]
        return real_BK[:, None, :] & (distance_BSK >= 0) & (rank_BK[:, None, :] >= oldest_BS1), distance_BSK


class VpMoeRMSNorm(nn.Module):
    """w x / rms(x), statistics in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight).to(x.dtype)


def alibi_slopes(heads, device):
    """2^(-8 (h+1) / H); for other than powers of two every other slope of the next power fills up."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-8.0 * (2 * h + 1) / (2 * power)) for h in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def rotate(x_BSHD, position_BS, frequency_F):
    """Turn each pair (x_j, x_{j + D/2}) by position times frequency, in fp32."""
    angle = position_BS.to(frequency_F.dtype)[:, :, None, None] * frequency_F
    cos, sin = torch.cos(angle), torch.sin(angle)
    first, second = x_BSHD.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHD.dtype)


class VpMoeAttention(nn.Module):
    """Grouped-query or tensor-product attention with its positions, sink and value residual."""

    def __init__(self, config: VpMoeConfig, number: int):
        super().__init__()
        self.config, self.number = config, number
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        is_global = config.is_global_layer(number)
        self.window = None if is_global else config.window_size
        self.positions = config.global_position_embedding if is_global else config.local_position_embedding
        qkv_size = (self.heads + 2 * self.groups) * self.dim
        self.tpa = config.tpa and not is_global
        if self.tpa:
            q_rank, rank = config.tpa_q_rank, config.tpa_rank
            self.a_sizes = [self.heads * q_rank, self.groups * rank, self.groups * rank]
            self.b_sizes = [q_rank * self.dim, rank * self.dim, rank * self.dim]
            self.linear_tpa_a = nn.Linear(config.hidden_size, sum(self.a_sizes), bias=config.tpa_factor_bias)
            self.linear_tpa_b = nn.Linear(config.hidden_size, sum(self.b_sizes), bias=False)
            self.qkv_bias = nn.Parameter(torch.zeros(qkv_size)) if config.qkv_bias else None
        else:
            self.linear_qkv = nn.Linear(config.hidden_size, qkv_size, bias=config.qkv_bias)
        self.linear_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=config.linear_bias)
        if config.qk_norm:
            self.q_layernorm = VpMoeRMSNorm(self.dim, config.rms_norm_eps)
            self.k_layernorm = VpMoeRMSNorm(self.dim, config.rms_norm_eps)
        self.sink = nn.Parameter(torch.zeros(self.heads)) if config.softmax_type == "learnable" else None
        if self.positions == "grape_m":
            self.grape_log_freq = nn.Parameter(torch.zeros(self.dim // 2))
        mixes = config.value_residual and number > 1
        self.value_residual_scale = nn.Parameter(torch.ones(())) if mixes else None

    def by_head(self, mixed):
        """Queries [..., H, D], keys and values [..., G, D] from the mixed layout: per group queries, key, value."""
        grouped = mixed.unflatten(-1, (self.groups, self.heads // self.groups + 2, self.dim))
        query, key, value = grouped.split([self.heads // self.groups, 1, 1], dim=-2)
        return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)

    def project(self, x_BSC):
        """Queries [B, S, H, D], keys and values [B, S, G, D]."""
        if not self.tpa:
            return self.by_head(self.linear_qkv(x_BSC))
        factors_a = self.linear_tpa_a(x_BSC).split(self.a_sizes, dim=-1)
        factors_b = self.linear_tpa_b(x_BSC).split(self.b_sizes, dim=-1)
        ranks = (self.config.tpa_q_rank, self.config.tpa_rank, self.config.tpa_rank)
        parts = [
            (a.unflatten(-1, (-1, rank)) / rank) @ b.unflatten(-1, (rank, -1))
            for a, b, rank in zip(factors_a, factors_b, ranks, strict=True)
        ]
        if self.qkv_bias is not None:
            parts = [part + bias for part, bias in zip(parts, self.by_head(self.qkv_bias), strict=True)]
        return parts

    def forward(self, x_BSC, tokens: VpMoeTokens, first_value, cache):
        """The output [B, S, C], this layer's own values [B, S, G, D], the weights [B, H, S, K]."""
        query, key, own_value = self.project(x_BSC)
        if self.config.qk_norm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.positions in ("grape_m", "rope"):
            if self.positions == "grape_m":
                frequency = torch.exp(self.grape_log_freq.float() / self.config.grapem_log_freq_scale)
            else:
                exponent = torch.arange(0, self.dim, 2, dtype=torch.float64, device=x_BSC.device) / self.dim
                frequency = (self.config.rotary_base**-exponent).float()
            query, key = (rotate(x, tokens.position_BS, frequency) for x in (query, key))
        value = own_value
        if self.value_residual_scale is not None:
            mix = self.value_residual_scale.float()
            value = (mix * own_value.float() + (1 - mix) * first_value.float()).to(own_value.dtype)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.number - 1)
        out_BHSD, weight_BHSK = self.attend(query, key, value, tokens)
        return self.linear_proj(out_BHSD.transpose(1, 2).flatten(2)), own_value, weight_BHSK

    def attend(self, query_BHSD, key_BGKD, value_BGKD, tokens: VpMoeTokens):
        """Softmax attention in fp32 within each document: the output, and the weights (the sink's is left out)."""
        seen_BSK, distance_BSK = tokens.seen(key_BGKD.shape[2], self.window)
        per_group = self.heads // self.groups
        key, value = (x.repeat_interleave(per_group, dim=1) for x in (key_BGKD, value_BGKD))
        score = (query_BHSD @ key.transpose(2, 3)).float() * self.dim**-0.5
        if self.positions == "grape_a":
            score = score - alibi_slopes(self.heads, score.device)[:, None, None] * distance_BSK[:, None]
        # Finite, so that a row of padding alone has no NaN.
        score = score.masked_fill(~seen_BSK[:, None], torch.finfo(score.dtype).min)
        if self.sink is None:
            weight = torch.softmax(score, dim=-1)
        else:
            column = self.sink.float().view(1, -1, 1, 1).expand(*score.shape[:3], 1)
            weight = torch.softmax(torch.cat([score, column], dim=-1), dim=-1)[..., :-1]
        weight = weight.to(value.dtype)
        return weight @ value, weight


def activated(inner, gated):
    """Squared ReLU, or SwiGLU of a gate that is stacked over the up projection."""
    if not gated:
        return torch.relu(inner).square()
    gate, up = inner.chunk(2, dim=-1)
    return functional.silu(gate) * up


class VpMoeFeedForward(nn.Module):
    """A dense feed-forward."""

    def __init__(self, config: VpMoeConfig, width: int):
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.linear_fc1 = nn.Linear(config.hidden_size, (2 if self.gated else 1) * width, bias=config.linear_bias)
        self.linear_fc2 = nn.Linear(width, config.hidden_size, bias=config.linear_bias)

    def forward(self, x):
        return self.linear_fc2(activated(self.linear_fc1(x), self.gated))


class VpMoeRouter(nn.Module):
    """Sigmoid (or softmax) scores, choice limited to groups, an expert bias that takes part in the choice alone."""

    expert_bias: torch.Tensor | None

    def __init__(self, config: VpMoeConfig):
        super().__init__()
        assert config.num_experts is not None
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if config.router_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x_NC):
        """The chosen experts [N, k] and their weights [N, k]."""
        config = self.config
        dtype = x_NC.dtype if config.router_dtype is None else getattr(torch, config.router_dtype)
        logits = functional.linear(x_NC.to(dtype), self.weight.to(dtype))
        if config.router_score_function == "softmax":
            chosen = self.choose(logits)
            weight = torch.softmax(logits.gather(1, chosen).float(), dim=-1).to(logits.dtype)
        else:
            scores = torch.sigmoid(logits.float()).to(logits.dtype)
            chosen = self.choose(scores if self.expert_bias is None else scores + self.expert_bias)
            weight = scores.gather(1, chosen)
            if config.num_experts_per_tok > 1:
                weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return chosen, weight * config.router_scaling_factor

    def choose(self, preference_NE):
        """The best experts of each token, of the groups whose best experts sum highest."""
        config = self.config
        topk = config.num_experts_per_tok
        if config.router_group_topk is not None:
            grouped = preference_NE.unflatten(1, (config.router_groups, -1))
            worth = grouped.topk(topk // config.router_group_topk, dim=-1).values.sum(-1)
            kept = torch.zeros_like(worth, dtype=torch.bool)
            kept.scatter_(1, worth.topk(config.router_group_topk, dim=1).indices, True)
            preference_NE = grouped.masked_fill(~kept[..., None], -math.inf).flatten(1)
        return preference_NE.topk(topk, dim=1).indices


class VpMoeExperts(nn.Module):
    """The routed experts' weights, one stack a matrix."""

    def __init__(self, config: VpMoeConfig):
        super().__init__()
        experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        assert experts is not None
        self.gated = config.activation == "swiglu"
        made = (2 if self.gated else 1) * width
        self.fc1_weight = nn.Parameter(torch.empty(experts, made, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(experts, hidden, width))
        self.fc1_bias = nn.Parameter(torch.zeros(experts, made)) if config.linear_bias else None
        self.fc2_bias = nn.Parameter(torch.zeros(experts, hidden)) if config.linear_bias else None

    def forward(self, x_NC, chosen_NK, weight_NK):
        out = torch.zeros_like(x_NC)
        for expert in chosen_NK.unique().tolist():
            token, slot = (chosen_NK == expert).nonzero(as_tuple=True)
            biases = [None if b is None else b[expert] for b in (self.fc1_bias, self.fc2_bias)]
            inner = functional.linear(x_NC[token], self.fc1_weight[expert], biases[0])
            result = functional.linear(activated(inner, self.gated), self.fc2_weight[expert], biases[1])
            out.index_add_(0, token, result * weight_NK[token, slot, None].to(result.dtype))
        return out


class VpMoeSparseFeedForward(nn.Module):
    """Routed experts, and the shared expert that every token visits."""

    def __init__(self, config: VpMoeConfig):
        super().__init__()
        self.router = VpMoeRouter(config)
        self.experts = VpMoeExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_experts = None if shared is None else VpMoeFeedForward(config, shared)

    def forward(self, x_BSC):
        x_NC = x_BSC.flatten(0, 1)
        out = self.experts(x_NC, *self.router(x_NC))
        if self.shared_experts is not None:
            out = out + self.shared_experts(x_NC)
        return out.view_as(x_BSC)
