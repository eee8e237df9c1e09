"""One layer of the training model for one new token a row, and what the layers of a step share.

Shapes: B rows, H hidden, G KV groups, P query heads a group, D head dim, C columns of the cache, E experts, K experts a
token, F expert FFN width. Heads and groups are those of one tensor-parallel rank.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.generation.kv_cache import KVCache, columns_of
from megatron_vpmoe.model.attention import grape
from megatron_vpmoe.model.attention.self_attention import VPSelfAttention
from megatron_vpmoe.model.attention.tpa import contract_factors
from megatron_vpmoe.model.norm import RMSNorm

_ONEDNN_FROM = 1 << 19
# A private operator of the pinned torch; a test holds its result to the model's own forward pass.
_onednn = torch.ops.mkldnn._linear_pointwise.default
_DENSE_ROWS, _GATHERED = 4, 0.125
"""Rows times top-k up to so many times the experts: every expert computes every row; up to the second: only theirs."""


_Linear = tuple[Tensor, Tensor | None]


class Step:
    """What the layers of one step share: places in the cache, angles, masks."""

    def __init__(self, position_B: Tensor, longest: int) -> None:
        self.position_B, self.longest = position_B, longest
        self._made: dict[object, Any] = {}

    def place(self, window: int | None, groups: int, width: int) -> Tensor:
        """int64 [B · G]: where the new token's keys go among rows of a cache layer [R, G, ``width``, D], flattened."""
        key = ("place", window, width)
        if key not in self._made:
            column_B = 1 + (self.position_B if window is None else self.position_B % window)
            row = torch.arange(len(column_B) * groups, device=column_B.device).view(-1, groups)
            self._made[key] = (row * width + column_B.unsqueeze(1)).flatten()
        return self._made[key]

    def bias(self, window: int | None, slopes_H: Tensor | None, groups: int, heads: int, dtype: torch.dtype) -> Tensor:
        """[B, G, P, 1 + C]: 0 or minus the slope times the distance, -inf where not visible; the sink's column free."""
        key = ("bias", window, slopes_H is not None)
        if key not in self._made:
            columns = columns_of(self.longest, window)
            age_BC = self.position_B.unsqueeze(1) - torch.arange(-1, columns, device=self.position_B.device)
            if window is not None:
                age_BC %= window
            visible_BC = (age_BC >= 0) & (age_BC <= self.position_B.unsqueeze(1))
            distance_BC = torch.where(visible_BC, age_BC.to(dtype), torch.inf)
            if slopes_H is None:
                bias = torch.where(visible_BC, 0.0, -distance_BC)[:, None, None]
            else:
                bias = distance_BC[:, None, None] * -slopes_H.to(dtype).view(groups, -1, 1)
            self._made[key] = bias.expand(-1, groups, heads // groups, -1).contiguous()
        return self._made[key]

    def rotation(self, frequency_F: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin [B, 1, 1, D] in the frequencies' dtype: x cos + roll(x, D/2) sin turns each pair."""
        key = ("rotation", id(frequency_F))
        if key not in self._made:
            angle_BF = self.position_B.unsqueeze(1).to(frequency_F.dtype) * frequency_F
            cos, sin = angle_BF.cos(), angle_BF.sin()
            self._made[key] = tuple(torch.cat(halves, -1)[:, None, None] for halves in ((cos, cos), (-sin, sin)))
        return self._made[key]


class Norm:
    """RMSNorm in four operations: w sqrt(D) x / hypot(|x|, sqrt(D eps))."""

    def __init__(self, *norms: RMSNorm) -> None:
        first = norms[0]
        width = first.weight.shape[-1]
        self._wide = torch.promote_types(first.weight.dtype, torch.float32)
        weight = first.weight if len(norms) == 1 else torch.stack([norm.weight for norm in norms])
        self._weight = weight.to(self._wide) * math.sqrt(width)
        self._eps = torch.tensor(math.sqrt(width * first.eps), dtype=self._wide, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self._wide)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).hypot_(self._eps)
        return wide.div(length).mul_(self._weight).to(x.dtype)


class Layer:
    """One layer: attention to the cache, and its feed-forward."""

    def __init__(self, layer: Any) -> None:
        self.attention: VPSelfAttention = layer.self_attention
        attention, config = self.attention, self.attention.config
        self._mlp, self._config = layer.mlp, config
        self._input_norm, self._mlp_norm = Norm(layer.input_layernorm), Norm(layer.pre_mlp_layernorm)
        self._heads, self._groups = attention.num_heads, attention.num_groups
        self._per_group = self._heads // self._groups
        norms = (attention.q_layernorm, attention.k_layernorm)
        self._qk_norm = None if norms[0] is None else Norm(*[norms[0]] * self._per_group, norms[1])  # type: ignore[list-item]
        device, tp = attention.linear_proj.weight.device, attention.tp_group
        self._wide = torch.promote_types(attention.linear_proj.weight.dtype, torch.float32)
        self._frequency = self._slopes = None
        if attention.grape_log_freq is not None:
            self._frequency = torch.exp(attention.grape_log_freq / config.grapem_log_freq_scale)
        elif attention.position_embedding == "rope":
            self._frequency = _rope(attention.head_dim, config.rotary_base, device)
        elif attention.position_embedding == "grape_a":
            self._slopes = grape.alibi_slopes(self._heads * tp.size(), device, tp.rank(), tp.size())
        sink = attention.sink
        self._sink = -torch.inf if sink is None else sink.view(self._groups, self._per_group)
        self._reduce = tp if tp.size() > 1 else None
        # Looked up once: a module's attribute takes as long as a small product.
        self._out = _tensors(attention.linear_proj)
        if attention.tpa is None:
            self._qkv = _tensors(attention.linear_qkv)
        else:
            self._a, self._b = _tensors(attention.linear_tpa_a), attention.linear_tpa_b.weight
        self._value_scale = attention.value_residual_scale
        dense = layer.mlp.shared_experts if isinstance(layer.mlp, MoELayer) else layer.mlp
        self._dense = None if dense is None else (_tensors(dense.linear_fc1), _tensors(dense.linear_fc2))
        self._viewed: Any = None

    def run(self, hidden_BH: Tensor, first_BGD: Tensor | None, step: Step, cache: KVCache) -> Tensor:
        """Add the layer's output to ``hidden_BH``, in place; returns layer 1's values."""
        out_BN, value_BGD = self._attend(self._input_norm(hidden_BH), first_BGD, step, cache)
        self._add(hidden_BH, out_BN, *self._out)
        x_BH = self._mlp_norm(hidden_BH)
        routed = isinstance(self._mlp, MoELayer)
        if not routed or self._lean_experts(len(x_BH)):
            if routed:
                hidden_BH += self._experts(x_BH)
            if self._dense is not None:
                self._feed_forward(hidden_BH, x_BH, *self._dense)
        else:
            out, bias = self._mlp(x_BH.unsqueeze(0))
            hidden_BH += out[0] if bias is None else out[0] + bias
        return value_BGD if first_BGD is None else first_BGD

    def _attend(self, x_BH: Tensor, first_BGD: Tensor | None, step: Step, cache: KVCache) -> tuple[Tensor, Tensor]:
        attention, per_group, window = self.attention, self._per_group, self.attention.window
        mixed = self._projected(x_BH)
        scored, own_BGD = mixed[:, :, : per_group + 1], mixed[:, :, per_group + 1]
        if self._qk_norm is not None:
            scored = self._qk_norm(scored)
        if self._frequency is not None:
            cos, sin = step.rotation(self._frequency)
            wide = scored.to(cos.dtype)
            turned = torch.addcmul(wide * cos, wide.roll(wide.shape[-1] // 2, -1), sin)
            scored = turned.to(scored.dtype)
        value_BGD = own_BGD
        if self._value_scale is not None:
            first, own = cast(Tensor, first_BGD).to(self._wide), own_BGD.to(self._wide)
            value_BGD = torch.lerp(first, own, self._value_scale.to(self._wide)).to(own_BGD.dtype)

        rows = len(x_BH)
        bias = step.bias(window, self._slopes, self._groups, self._heads, self._wide)
        bias[..., 0] = self._sink
        width, stored = self._views(cache, rows, bias.shape[-1])
        place = step.place(window, self._groups, width)
        for flat, new in zip(stored[:2], (scored[:, :, per_group], value_BGD), strict=True):
            flat.index_copy_(0, place, new.reshape(-1, new.shape[-1]))
        key, value = (x.to(self._wide) for x in stored[2:])
        query = scored[:, :, :per_group].flatten(0, 1).to(self._wide)
        score = torch.baddbmm(bias.flatten(0, 1), query, key, alpha=attention.softmax_scale)
        out = torch.bmm(torch.softmax(score, -1), value)
        return out.to(x_BH.dtype).view(rows, -1), own_BGD

    def _views(self, cache: KVCache, rows: int, columns: int) -> tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Columns of a row in the cache; the layer's keys and values to write, [.., D], and to read, [B · G, D, C] and
        [B · G, C, D]. Made again only where they change.
        """
        stored = cache.layer(self.attention.layer_number)
        if self._viewed is None or self._viewed[0] is not stored or self._viewed[1:3] != (rows, columns):
            key, value = (x[:rows, :, :columns].flatten(0, 1) for x in stored)
            flat = tuple(x.flatten(0, 2) for x in stored)
            self._viewed = stored, rows, columns, stored[0].shape[2], (*flat, key.transpose(1, 2), value)
        return self._viewed[3:]

    def _projected(self, x_BH: Tensor) -> Tensor:
        """Megatron's mixed layout [B, G, P + 2, D]: of each group its queries, its key, its value."""
        attention = self.attention
        if attention.tpa is None:
            qkv = linear(x_BH, *self._qkv)
            return qkv.view(len(x_BH), self._groups, self._per_group + 2, -1)
        a, b = linear(x_BH, *self._a), linear(x_BH, self._b)
        query, key, value = contract_factors(a[None], b[None], attention.tpa)
        query = query[0].unflatten(1, (self._groups, self._per_group))
        mixed = torch.cat([query, key[0].unsqueeze(2), value[0].unsqueeze(2)], 2)
        return mixed if attention.qkv_bias is None else mixed.add_(attention.qkv_bias.view(mixed.shape[1:]))

    def _feed_forward(self, hidden_BH: Tensor, x_BH: Tensor, first: _Linear, last: _Linear) -> None:
        up = linear(x_BH, *first)
        activation = cast(Any, self._config.activation_func)
        if self._config.gated_linear_unit:
            gate, up = up.chunk(2, -1)
            up = activation(gate) * up
        else:
            up = activation(up)
        self._add(hidden_BH, up, *last)

    def _add(self, hidden_BH: Tensor, x_BN: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """A row-parallel linear of ``x_BN`` added to the residual stream."""
        if bias is not None:
            hidden_BH += bias
        out_BH = linear(x_BN, weight)
        if self._reduce is not None:
            torch.distributed.all_reduce(out_BH, group=self._reduce)
        hidden_BH += out_BH

    def _lean_experts(self, rows: int) -> bool:
        """Whether every expert is on this rank, and rows are few enough to compute more than is asked for."""
        mlp, config = self._mlp, self._config
        alone = mlp.ep_group.size() == 1 and self._reduce is None
        return alone and rows * config.moe_router_topk <= _DENSE_ROWS * cast(int, config.num_moe_experts)

    def _experts(self, x_BH: Tensor) -> Tensor:
        experts, router = self._mlp.experts, self._mlp.router
        probs_BE, _ = router.routing(router.gating(x_BH))
        topk = self._config.moe_router_topk
        gathered = len(x_BH) * topk <= _GATHERED * probs_BE.shape[1]
        w1, b1, w2, b2 = experts.fc1_weight, experts.fc1_bias, experts.fc2_weight, experts.fc2_bias
        if gathered:
            probs_BK, chosen_BK = probs_BE.topk(topk)
            x, probs = x_BH.repeat_interleave(topk, 0).unsqueeze(1), probs_BK.view(-1, 1, 1)
            chosen = chosen_BK.flatten()
            w1, w2 = w1.index_select(0, chosen), w2.index_select(0, chosen)
            b1 = None if b1 is None else b1.index_select(0, chosen)
        else:
            x, probs = x_BH.expand(probs_BE.shape[1], -1, -1), probs_BE.t().unsqueeze(2)
        up = torch.bmm(x, w1.mT) if b1 is None else torch.baddbmm(b1.unsqueeze(1), x, w1.mT)
        out = torch.bmm((up.relu_().square_() * probs).to(x_BH.dtype), w2.mT)
        out_BH = out.view(len(x_BH), topk, -1).sum(1) if gathered else out.sum(0)
        return out_BH if b2 is None else out_BH.addmm_(probs_BE.to(x_BH.dtype), b2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. In fp32 on a CPU large ones by oneDNN: with few rows in 0.4 to 0.8 of the time of torch's own."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and len(x) * weight.numel() >= _ONEDNN_FROM:
        return _onednn(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def _tensors(module: Any) -> _Linear:
    return module.weight, module.bias


@functools.cache
def _rope(head_dim: int, base: float, device: torch.device) -> Tensor:
    return grape.rope_frequencies(head_dim, base).to(device)
