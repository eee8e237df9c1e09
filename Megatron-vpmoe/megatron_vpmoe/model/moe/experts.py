"""Routed experts as stacked 3-D weights: one product for all experts of a rank, with biases and ReLU² or SwiGLU.

Shapes: T tokens of K experts each, N rows dispatched to this rank (copies of tokens for one expert), P places of rows
(``expert_rows``), E local experts, H hidden, F expert FFN width, A what the first matrix makes: F, or 2 F with a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_vpmoe.model.moe.activation import Activation, activation_of
from megatron_vpmoe.model.moe.expert_rows import GroupedRows, Numbers, layout_of
from megatron_vpmoe.model.moe.narrow_rows import narrow_rows
from megatron_vpmoe.model.precision import multiplies_narrow, wide_product
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
    """For each token the sum over its experts of p (W2 act(W1 x + b1) + b2), and its derivative.

    Written out because autograd would keep every step: here the tokens, p and, of the first product, what the
    activation keeps of it are kept, and rows are gathered again backward. The second bias is a product of p over all
    experts with the biases, never a row's. The weight p and its gradient stay in their own precision (fp32).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: GroupedRows,
        activation: Activation,
        x_TH: Tensor,
        p_TK: Tensor,
        w1_EAH: Tensor,
        b1_EA: Tensor | None,
        w2_EHF: Tensor,
        b2_EH: Tensor | None,
    ) -> Tensor:
        kept_PA = activation.kept(rows.linear(rows.gather(x_TH), w1_EAH, b1_EA))
        weighted_PF = activation.value(kept_PA)
        torch.mul(weighted_PF, rows.spread(p_TK), out=weighted_PF)  # in the precision of p, rounded once
        out_TH = rows.add_up(rows.linear(weighted_PF, w2_EHF, None))
        if b2_EH is not None:
            p_TE = rows.over_experts(p_TK.to(x_TH.dtype))
            if multiplies_narrow(p_TE, p_TK.dtype):
                out_TH.addmm_(p_TE, b2_EH)
            else:
                out_TH += wide_product(p_TE, b2_EH, p_TK.dtype)
        ctx.rows, ctx.activation, ctx.has_b1 = rows, activation, b1_EA is not None
        ctx.save_for_backward(x_TH, p_TK, kept_PA, w1_EAH, w2_EHF, b2_EH)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TH, p_TK, kept_PA, w1_EAH, w2_EHF, b2_EH = ctx.saved_tensors
        rows: GroupedRows = ctx.rows
        activation: Activation = ctx.activation
        grad_TH, p_P1, value_PF = grad_TH.contiguous(), rows.spread(p_TK), activation.value(kept_PA)
        grad_PH = rows.gather(grad_TH)
        grad_w2 = rows.outer(grad_PH, (value_PF * p_P1).to(kept_PA.dtype))
        grad_PF = rows.linear_transposed(grad_PH, w2_EHF)
        # The router's gradient: of products in its own precision, not of rounded ones.
        grad_p, grad_b2 = rows.collect((grad_PF.to(p_TK.dtype) * value_PF).sum(-1)), None
        if b2_EH is not None:
            grad_p += rows.at_experts(wide_product(grad_TH, b2_EH.t(), p_TK.dtype))
            grad_b2 = wide_product(rows.over_experts(p_TK.to(grad_TH.dtype)).t(), grad_TH, p_TK.dtype).to(b2_EH.dtype)
        grad_PA = activation.gradient(grad_PF, kept_PA, p_P1)
        grad_w1 = rows.outer(grad_PA, rows.gather(x_TH))
        grad_b1 = rows.total(grad_PA) if ctx.has_b1 else None
        grad_x = rows.add_up(rows.linear_transposed(grad_PA, w1_EAH))
        return None, None, grad_x, grad_p, grad_w1, grad_b1, grad_w2, grad_b2


class StackedExperts(MegatronModule):
    """The local experts of one MoE layer: fc2(act(fc1(x) + b1)) + b2, weighted by the router's probability.

    Parameters (E_local first; every expert's matrix is output by input, as in ``torch.nn.Linear``):
    ``fc1_weight`` [E, A, H], ``fc1_bias`` [E, A], ``fc2_weight`` [E, H, F], ``fc2_bias`` [E, H]. With a gate the F
    rows of its projection stand before the F of the up projection, as in Megatron's gated MLP: two matrices to the
    optimizer (``matrix_rows``).

    ``last_layout`` names the layout that the rule chose last.
    """

    config: VPTransformerConfig

    def __init__(
        self, num_local_experts: int, config: VPTransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.expt_dp_group = pg_collection.ep, pg_collection.expt_dp
        self.last_layout: str | None = None
        hidden, ffn, total = config.hidden_size, config.moe_ffn_hidden_size, config.num_moe_experts
        assert ffn is not None and total is not None
        self.activation = activation_of(config.gated_linear_unit)
        made = 2 * ffn if config.gated_linear_unit else ffn
        self.fc1_weight = self._expert_parameter(total, (made, hidden), config.init_method)
        self.fc2_weight = self._expert_parameter(total, (hidden, ffn), config.output_layer_init_method)
        if config.add_bias_linear:
            self.fc1_bias = self._expert_parameter(total, (made,), torch.nn.init.zeros_)
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

    def of_tokens(
        self,
        x_TH: Tensor,
        expert_TK: Tensor,
        p_TK: Tensor,
        numbers: Numbers | None = None,
        *,
        in_order: bool = False,
    ) -> Tensor:
        """Each token's experts' outputs, weighted and added up.

        Args:
            x_TH: tokens.
            expert_TK: integers, the experts of each.
            p_TK: the router's weight of each.
            numbers: shared with other layers of the pass.
            in_order: the tokens are sorted by their only expert (K = 1).

        Returns:
            [T, H] in the dtype of x.
        """
        rows = self._rows(expert_TK, x_TH.dtype, numbers, in_order)
        self.last_layout = rows.name
        with annotated("experts"):
            weights = self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
            out = _ExpertFeedForward.apply(rows, self.activation, x_TH, p_TK, *weights)
        return cast(Tensor, out)

    def _rows(self, expert_TK: Tensor, dtype: torch.dtype, numbers: Numbers | None, in_order: bool) -> GroupedRows:
        """In training in the format that was asked for; sampling and evaluation take the weights as they are."""
        experts, precision = self.num_local_experts, self.config.experts_precision
        if precision is None or not self.training:
            return layout_of(expert_TK, experts, dtype, numbers, in_order=in_order)
        _, hidden, ffn = self.fc2_weight.shape
        return narrow_rows(precision, expert_TK, experts, numbers, hidden=hidden, ffn=ffn, in_order=in_order)

    def forward(self, x_NH: Tensor, tokens_per_expert: Tensor, probs_N: Tensor) -> tuple[Tensor, None]:
        """As upstream's dispatchers ask, where experts are spread over ranks.

        Args:
            x_NH: dispatched tokens sorted by local expert.
            tokens_per_expert: int64 [E], on the CPU.
            probs_N: the router's weight of each row.

        Returns:
            the weighted outputs [N, H] in the dtype of x, and None: biases are inside.
        """
        rows = x_NH.shape[0]
        if rows == 0:
            # No product to make. The weights still need their (zero) gradients, and both inputs a path back: each came
            # through a collective of its own, whose backward pass the other ranks wait in.
            untouched = probs_N.sum() + sum(parameter.sum() for parameter in self.parameters())
            return x_NH + (untouched * 0.0).to(x_NH.dtype), None
        expert_N = torch.repeat_interleave(tokens_per_expert.to(x_NH.device), output_size=rows)
        return self.of_tokens(x_NH, expert_N.unsqueeze(1), probs_N.unsqueeze(1), in_order=True), None

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
