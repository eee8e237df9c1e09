"""A layer's routed experts for one new token a row.

Few rows: the weights of their experts are gathered. More: every expert computes every row, without sorting rows by
experts. Still more, or experts spread over ranks: the training model's own module.

Shapes: B rows, H hidden, E experts, K experts a token, F expert FFN width, A what the first matrix makes (F, or 2 F of
a gate over its up projection).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_vpmoe.generation.linear import Linear
from megatron_vpmoe.model.moe.router import chosen_experts, weights_at

_ALL, _GATHERED = 4, 0.125
"""Rows times K up to so many times E: every expert computes every row; up to the second: only theirs."""


class Experts:
    """Routed experts, all of them whole on this rank."""

    def __init__(self, layer: MoELayer) -> None:
        experts: Any = layer.experts
        self._router: Any = layer.router
        self._w1, self._b1 = experts.fc1_weight.detach(), experts.fc1_bias
        self._w2T, self._b2 = experts.fc2_weight.detach().mT, experts.fc2_bias
        self._activation = experts.activation
        bias = None if self._b1 is None else self._b1.flatten()
        self._first = Linear(self._w1.flatten(0, 1), bias, packed=False)
        wide = {"fp32": torch.float32, "fp64": torch.float64, None: self._w1.dtype}[layer.config.moe_router_dtype]
        self._gate = self._router.weight.detach().to(wide).t()

    def suit(self, rows: int) -> bool:
        """Whether rows are few enough to compute more than is asked for."""
        return rows * self._router.topk <= _ALL * len(self._w1)

    def add(self, hidden_BH: Tensor, x_BH: Tensor) -> None:
        """Add the experts' output for ``x_BH`` to ``hidden_BH``, in place."""
        weight_BK, chosen_BK = self._route(x_BH)
        rows, (experts, made, _) = len(x_BH), self._w1.shape
        if chosen_BK.numel() <= _GATHERED * experts:
            chosen, each = chosen_BK.flatten(), weight_BK.view(-1, 1, 1)
            x = x_BH.repeat_interleave(chosen_BK.shape[1], 0).unsqueeze(1)
            w1T, w2T = self._w1.index_select(0, chosen).mT, self._w2T.index_select(0, chosen)
            inner = torch.bmm(x, w1T)
            if self._b1 is not None:
                inner += self._b1.index_select(0, chosen).unsqueeze(1)
            out = torch.bmm(self._activated(inner, each), w2T)
            if self._b2 is not None:
                out = torch.addcmul(out, self._b2.index_select(0, chosen).unsqueeze(1), each.to(out.dtype))
            hidden_BH += out.view(rows, -1, out.shape[-1]).sum(1)
            return
        weight_BE = weight_BK.new_zeros(rows, experts).scatter_(1, chosen_BK, weight_BK)
        value = self._activated(self._first(x_BH).view(rows, experts, made), weight_BE.unsqueeze(2))
        hidden_BH += torch.bmm(value.transpose(0, 1), self._w2T).sum(0)
        if self._b2 is not None:
            hidden_BH.addmm_(weight_BE.to(hidden_BH.dtype), self._b2)

    def _route(self, x_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts [B, K]: ``VPMoERouter.choose`` without what training wants."""
        router = self._router
        config, bias = router.config, router.expert_bias
        score_BE = torch.mm(x_BH.to(self._gate.dtype), self._gate)
        if router.score_function == "sigmoid":
            score_BE = score_BE.sigmoid_()
        ranked_BE = score_BE if bias is None else score_BE + bias
        groups = config.moe_router_num_groups, config.moe_router_group_topk
        chosen_BK = chosen_experts(ranked_BE, router.topk, *groups)
        if router.recorded is not None:
            router.recorded.append(chosen_BK)
        scaling = config.moe_router_topk_scaling_factor
        return weights_at(score_BE, chosen_BK, router.score_function, scaling), chosen_BK

    def _activated(self, inner: Tensor, weight: Tensor) -> Tensor:
        """[..., A] -> [..., F], weighted; ``inner`` is used up."""
        value = self._activation.value(self._activation.kept(inner))
        return value.mul_(weight) if weight.dtype == value.dtype else (value * weight).to(value.dtype)
