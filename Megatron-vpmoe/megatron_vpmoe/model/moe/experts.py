"""Routed experts as stacked 3-D weights: one product for all experts of a rank, with biases and ReLU².

Shapes: N rows dispatched to this rank (top-k copies of tokens), E local experts, H hidden, F expert FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.moe.expert_rows import ExpertRows, choose_layout
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.ranges import annotated

SHARDED_NAMES = {
    "fc1_weight": "experts.linear_fc1.weight",
    "fc1_bias": "experts.linear_fc1.bias",
    "fc2_weight": "experts.linear_fc2.weight",
    "fc2_bias": "experts.linear_fc2.bias",
}
"""Our parameter -> its key in a distributed checkpoint, after the experts' prefix: SequentialMLP's own key. Both
classes describe it as one global tensor [E, ...] cut along its first axis, so either loads what the other saved."""


class _ExpertFeedForward(Function):
    """p (W2 relu(W1 x + b1)² + b2) for every row with its own expert, and its derivative.

    Written out because autograd would keep every step of the activation, and an [N, H] tensor of biases: here x, the
    pre-activation, the weighted activation and p are kept. The weight p stays in its own precision (fp32).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: ExpertRows,
        x_NH: Tensor,
        p_N: Tensor,
        w1_EFH: Tensor,
        b1_EF: Tensor | None,
        w2_EHF: Tensor,
        b2_EH: Tensor | None,
    ) -> Tensor:
        x, p = rows.enter(x_NH), rows.enter(p_N.unsqueeze(1))
        before = rows.linear(x, w1_EFH, b1_EF)
        weighted = (torch.relu(before).square_() * p).to(x.dtype)
        out = rows.linear(weighted, w2_EHF, None)
        if b2_EH is not None:
            out.addcmul_(rows.spread(b2_EH), p.to(x.dtype))
        ctx.rows = rows
        ctx.save_for_backward(x, p, before, weighted, w1_EFH, w2_EHF, b2_EH)
        ctx.has_b1 = b1_EF is not None
        return rows.leave(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, p, before, weighted, w1_EFH, w2_EHF, b2_EH = ctx.saved_tensors
        rows: ExpertRows = ctx.rows
        grad = rows.enter(grad_NH)
        active = torch.relu(before)
        grad_w2 = rows.outer(grad, weighted)
        grad_weighted = rows.linear_transposed(grad, w2_EHF)
        grad_p = (grad_weighted * active.square()).sum(-1, keepdim=True)
        grad_b2 = None
        if b2_EH is not None:
            grad_p += rows.dot(grad, b2_EH)
            grad_b2 = rows.total(grad, p)
        grad_before = grad_weighted.mul_(active).mul_(2.0 * p)
        grad_w1 = rows.outer(grad_before, x)
        grad_b1 = rows.total(grad_before) if ctx.has_b1 else None
        grad_x = rows.linear_transposed(grad_before, w1_EFH)
        return None, rows.leave(grad_x), rows.leave(grad_p).squeeze(1).to(p.dtype), grad_w1, grad_b1, grad_w2, grad_b2


class StackedExperts(MegatronModule):
    """The local experts of one MoE layer: fc2(act(fc1(x) + b1)) + b2, weighted by the router's probability.

    Parameters (E_local first; every expert's matrix is output by input, as in ``torch.nn.Linear``):
    ``fc1_weight`` [E, F, H], ``fc1_bias`` [E, F], ``fc2_weight`` [E, H, F], ``fc2_bias`` [E, H].

    ``last_layout`` names the layout that the rule chose last.
    """

    def __init__(
        self, num_local_experts: int, config: VPTransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.expt_dp_group = pg_collection.ep, pg_collection.expt_dp
        self.last_layout: str | None = None
        hidden, ffn, total = config.hidden_size, config.moe_ffn_hidden_size, config.num_moe_experts
        assert ffn is not None and total is not None
        self.fc1_weight = self._expert_parameter(total, (ffn, hidden), config.init_method)
        self.fc2_weight = self._expert_parameter(total, (hidden, ffn), config.output_layer_init_method)
        if config.add_bias_linear:
            self.fc1_bias = self._expert_parameter(total, (ffn,), torch.nn.init.zeros_)
            self.fc2_bias = self._expert_parameter(total, (hidden,), torch.nn.init.zeros_)
        else:
            self.register_parameter("fc1_bias", None)
            self.register_parameter("fc2_bias", None)

    def _expert_parameter(
        self, total_experts: int, shape: tuple[int, ...], init: Callable[[Tensor], Any] | None
    ) -> torch.nn.Parameter:
        """This rank's slice of the whole stack, which every rank draws alike: any EP size starts from equal weights."""
        whole = torch.empty(total_experts, *shape, dtype=torch.float32)
        if self.config.perform_initialization:
            assert init is not None
            init(whole)
        first = self.ep_group.rank() * self.num_local_experts
        local = whole[first : first + self.num_local_experts].to(self.config.params_dtype).clone()
        parameter = torch.nn.Parameter(local)
        # Read by Megatron-Core: gradients are reduced over the expert-data-parallel group only.
        parameter.allreduce = False  # type: ignore[attr-defined]
        return parameter

    def forward(self, x_NH: Tensor, tokens_per_expert: Tensor, probs_N: Tensor) -> tuple[Tensor, None]:
        """Compute the experts' outputs.

        Args:
            x_NH: dispatched tokens sorted by local expert.
            tokens_per_expert: int64 [E], on the CPU.
            probs_N: the router's weight of each row.

        Returns:
            the weighted outputs [N, H] in the dtype of x, and None: biases are inside.
        """
        if x_NH.shape[0] == 0:
            # No product to make. The weights still need their (zero) gradients, and both inputs a path back: each came
            # through a collective of its own, whose backward pass the other ranks wait in.
            untouched = probs_N.sum() + sum(parameter.sum() for parameter in self.parameters())
            return x_NH + (untouched * 0.0).to(x_NH.dtype), None
        layout = choose_layout(tokens_per_expert, x_NH.dtype, x_NH.device.type)
        self.last_layout = layout.name
        rows = layout(tokens_per_expert, x_NH.device)
        with annotated("experts"):
            out = _ExpertFeedForward.apply(
                rows, x_NH, probs_N, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
            )
        return out, None  # type: ignore[return-value]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """One global tensor a parameter, expert axis split over expert-parallel ranks, under SequentialMLP's keys.

        Loads at any expert-parallel size, and from or into upstream's SequentialMLP (``SHARDED_NAMES``).
        """
        prepended = len(sharded_offsets)
        expert_axis = (prepended, self.ep_group.rank(), self.ep_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{SHARDED_NAMES[name]}",
                parameter,
                *sharded_offsets,
                expert_axis,
                replica_id=(0, 0, self.expt_dp_group.rank()),
                prepend_axis_num=prepended,
            )
            for name, parameter in self.named_parameters()
        }
