"""The vpMoE assembled from Megatron-Core's stock local parts, and NorMuon in a loop: the other side of step.py."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.attention import self_attention
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.norm import RMSNorm
from megatron_vpmoe.model.output import ModelOutput
from megatron_vpmoe.model.tensor_parallel import ColumnLinear, RowLinear
from megatron_vpmoe.objectives import Objective, ObjectiveResult, build_objective
from megatron_vpmoe.optim.assignment import assigned_parameters
from megatron_vpmoe.optim.polar_express import COEFFICIENTS
from megatron_vpmoe.training.step import train_step

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ref.sequential_experts import sequential_from_stacked

OUR_CORE_ATTENTION = self_attention.core_attention


class Stock:
    """The stock model in training, from the weights of ours."""

    def __init__(self, cfg: RunConfig, ours: VPModel, steps: list[list[Batch]]) -> None:
        self.steps, self.loss, self._step = steps, math.nan, 0
        model = build_model(cfg)
        model.load_state_dict(ours.state_dict())
        for layer in model.decoder.layers:
            if isinstance(layer.mlp, MoELayer):
                _stock_moe(layer.mlp)
        _stock_linears(model)
        _stock_norms(model)
        self.attention = _StockAttention(model)
        self.wrapped = wrap_for_training(model, cfg)
        self.optimizer: Any = PerMatrixOptimizer(model, cfg)
        self.objective = StockObjective(build_objective(cfg))

    def step(self) -> None:
        """One step on the same data as ours."""
        self_attention.core_attention = self.attention
        try:
            batches = self.steps[self._step % len(self.steps)]
            result = train_step(self.wrapped, self.optimizer, self.objective, batches)
        finally:
            self_attention.core_attention = OUR_CORE_ATTENTION
        self.loss = result.metrics["loss/total"]
        self._step += 1


class _Router(TopKRouter):
    """Upstream's, told of no padding (there is none): with a mask its count of loads fails (router.py:542)."""

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Any:
        return super().forward(input)


def _stock_forward(layer: Any, hidden_states: Tensor, padding_mask: Any = None) -> Any:
    """Upstream's, of which the router wants no mask either."""
    return MoELayer.forward(layer, hidden_states)


def _stock_moe(layer: Any) -> None:
    """Upstream's router (its bias, which the design has not, zero and frozen), dispatcher and experts, with the same
    weights."""
    groups, ours = get_default_pg_collection(), layer.router
    layer.forward = MethodType(_stock_forward, layer)
    layer.router = _Router(config=layer.config, pg_collection=groups).to(ours.weight.device)
    layer.router.set_layer_number(ours.layer_number)
    stacked = layer.experts.state_dict()
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer.experts = SequentialMLP(layer.num_local_experts, layer.config, linears, groups).to(ours.weight.device)
    layer.experts.load_state_dict(sequential_from_stacked(stacked), strict=False)
    expert: Any
    for expert in layer.experts.local_experts:
        expert.linear_fc2.explicit_expert_comm = True  # see docs/megatron.md: with it biases can be trained
    for parameter in layer.experts.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]
    with torch.no_grad():
        layer.router.weight.copy_(ours.weight)
        if layer.router.bias is not None:
            layer.router.bias.zero_().requires_grad_(False)


def _stock_linears(model: VPModel) -> None:
    for module in model.modules():
        for ours, upstream in ((ColumnLinear, ColumnParallelLinear), (RowLinear, RowParallelLinear)):
            if isinstance(module, ours):
                module.forward = MethodType(upstream.forward, module)


def _stock_norms(model: VPModel) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                norm: Any = WrappedTorchNorm(child.config, child.weight.shape[0], child.eps)
                norm.weight = child.weight
                setattr(module, name, norm)


class _StockAttention:
    """Upstream's unfused attention in the place of ``core_attention``."""

    def __init__(self, model: VPModel) -> None:
        config = copy.copy(model.config)
        config.softmax_type, config.window_size = "vanilla", None
        self._bias: Tensor | None = None
        self.attention: Any = DotProductAttention(config, 1, AttnMaskType.causal, "self")
        self.attention.scale_mask_softmax.mask_func = self._mask

    def _mask(self, scores: Tensor, hidden: Tensor) -> Tensor:
        scores = scores if self._bias is None else scores + self._bias.to(scores.dtype)
        return scores.masked_fill(hidden, -10000.0)

    def __call__(
        self,
        q_BHSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        *,
        layout: SequenceLayout,
        window: int | None,
        alibi_slopes_H: Tensor | None,
        sink_H: Tensor | None,
        softmax_scale: float,
        backend: str,
    ) -> Tensor:
        del softmax_scale, backend  # upstream's own: 1/sqrt(D), unfused
        self._bias = None if alibi_slopes_H is None else -alibi_slopes_H[:, None, None] * layout.distance()
        self.attention.softmax_offset = sink_H
        sequence_first = (x.permute(2, 0, 1, 3).contiguous() for x in (q_BHSD, k_BGSD, v_BGSD))
        out_SBN = self.attention(*sequence_first, ~layout.visible(window))
        return out_SBN.unflatten(-1, (q_BHSD.shape[1], -1)).permute(1, 2, 0, 3)


class _StockOutput(ModelOutput):
    """All logits, and upstream's cross-entropy over them."""

    def cross_entropy(self, labels_BS: Tensor, where: Tensor, weight_BS: Tensor) -> tuple[Tensor, Tensor]:
        logits_SBV = self.logits().transpose(0, 1).contiguous()
        losses_BS = vocab_parallel_cross_entropy(logits_SBV.float(), labels_BS.t().contiguous()).t()
        chosen = losses_BS.flatten()[where]
        return (chosen * weight_BS.flatten()[where]).sum(), chosen.detach()


@dataclass(frozen=True)
class StockObjective(Objective):
    """An objective that reads losses the stock way."""

    inner: Objective

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        return self.inner.counts(batches)

    def summary(self, totals: dict[str, float]) -> dict[str, float]:
        return self.inner.summary(totals)

    def __call__(self, output: ModelOutput, batch: Batch, totals: dict[str, float]) -> ObjectiveResult:
        return self.inner(_StockOutput(output.hidden_BSH, output.model), batch, totals)


class PerMatrixOptimizer:
    """Clipping, NorMuon one matrix at a time, and torch's AdamW for the rest; constant learning rates."""

    def __init__(self, model: VPModel, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.matrices: list[tuple[torch.nn.Parameter, slice, float, float]] = []
        rest: list[dict[str, Any]] = []
        for row, parameter in assigned_parameters(model, cfg):
            if row.optimizer == "normuon":
                rows = getattr(parameter, "matrix_rows", (slice(None),))
                self.matrices += [(parameter, part, row.lr, row.weight_decay) for part in rows]
            else:
                rest.append({"params": [parameter], "lr": row.lr, "weight_decay": row.weight_decay})
        self.momenta = [torch.zeros_like(parameter[part]) for parameter, part, *_ in self.matrices]
        self.statistics = [momentum.new_zeros(len(momentum), 1) for momentum in self.momenta]
        betas = (cfg.optim.adam_beta1, cfg.optim.adam_beta2)
        self.adamw = torch.optim.AdamW(rest, betas=betas, eps=cfg.optim.adam_eps)

    def zero_grad(self) -> None:
        """Gradients live in Megatron's buffers, which the step empties."""

    def prepare_grads(self) -> None:
        for parameter in self.parameters:
            parameter.grad = parameter.main_grad  # type: ignore[attr-defined]

    def squared_grad_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]).double().square()

    @torch.no_grad()
    def update(self, grad_norm: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.cfg.optim.clip_grad, torch.tensor(grad_norm))
        for index in range(len(self.matrices)):
            self._normuon(index)
        self.adamw.step()
        for parameter in self.parameters:
            parameter.grad = None

    def _normuon(self, index: int) -> None:
        optim = self.cfg.optim
        parameter, part, lr, decay = self.matrices[index]
        assert parameter.grad is not None
        weight, grad = parameter[part], parameter.grad[part]
        if not grad.any():
            return
        momentum = self.momenta[index].lerp_(grad, 1 - optim.normuon_momentum)
        update = _polar_express(torch.lerp(grad, momentum, optim.normuon_momentum), optim.polar_express_safety)
        norm = update.norm()
        statistic = self.statistics[index].lerp_(update.square().mean(1, keepdim=True), 1 - optim.normuon_beta2)
        update = update / (statistic + optim.normuon_eps).sqrt()
        update *= norm / update.norm() * max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        updated = weight.mul(1 - lr * decay).sub_(update, alpha=lr)
        parameter[part] = updated


def _polar_express(x: Tensor, safety: float) -> Tensor:
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() * (1 + safety) + 1e-6)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
