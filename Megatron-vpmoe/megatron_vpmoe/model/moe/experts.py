"""Routed experts as stacked 3-D weights: one grouped product for all experts of a rank, with biases and ReLU².

Shapes: N tokens dispatched to this rank (top-k copies), E local experts, H hidden, F expert FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.model.transformer_config import VPTransformerConfig

# Columns that carry fc2's bias; grouped GEMM on CUDA wants rows of whole 16 bytes.
BIAS_COLUMNS = 8


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """x_n @ weight_e(n)^T with torch's grouped GEMM; rows of x sorted by expert. Returns [N, O] in the dtype of x."""
    offsets = tokens_per_expert.cumsum(0).to(device=x_NI.device, dtype=torch.int32)
    return functional.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=offsets)


class StackedExperts(MegatronModule):
    """The local experts of one MoE layer: fc2(act(fc1(x) + b1)) + b2, weighted by the router's probability.

    Parameters (E_local first; every expert's matrix is output by input, as in ``torch.nn.Linear``):
    ``fc1_weight`` [E, F, H], ``fc1_bias`` [E, F], ``fc2_weight`` [E, H, F], ``fc2_bias`` [E, H].
    """

    def __init__(
        self, num_local_experts: int, config: VPTransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        if config.gated_linear_unit:
            raise ConfigError(
                "gated activations are not available in routed experts",
                source="model.activation = swiglu with moe.num_experts set",
                remedy="use activation: squared_relu, the design of vpMoE",
            )
        self.num_local_experts = num_local_experts
        self.ep_group, self.expt_dp_group = pg_collection.ep, pg_collection.expt_dp
        self.activation: Callable[[Tensor], Tensor] = config.activation_func
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
        probs_N1 = probs_N.unsqueeze(-1).to(x_NH.dtype)
        if x_NH.shape[0] == 0:
            # Autograd hands an empty operand gradients of stride 0, which grouped GEMM's backward refuses; every weight
            # still needs its (zero) gradient.
            return x_NH + sum(parameter.sum() for parameter in self.parameters()) * 0.0, None
        hidden_NF = grouped_linear(x_NH, self.fc1_weight, tokens_per_expert)
        if self.fc1_bias is None or self.fc2_bias is None:
            return grouped_linear(self.activation(hidden_NF) * probs_N1, self.fc2_weight, tokens_per_expert), None
        counts = tokens_per_expert.to(x_NH.device)
        expert_N = torch.repeat_interleave(counts, output_size=x_NH.shape[0])
        # An embedding look-up: its backward sums rows per expert, where indexing's would scatter them one by one.
        hidden_NF = self.activation(hidden_NF + functional.embedding(expert_N, self.fc1_bias)) * probs_N1
        # p (W h + b) as one product [W b] [p h; p]: no pass over [N, H] for the weight and the bias.
        widened_NF = torch.cat([hidden_NF, functional.pad(probs_N1, (0, BIAS_COLUMNS - 1))], dim=1)
        fc2_bias_EHC = functional.pad(self.fc2_bias.unsqueeze(-1), (0, BIAS_COLUMNS - 1))
        fc2_EHF = torch.cat([self.fc2_weight, fc2_bias_EHC], dim=2)
        return grouped_linear(widened_NF, fc2_EHF, tokens_per_expert), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """One global tensor a parameter, expert axis split over expert-parallel ranks: loads at any EP size."""
        prepended = len(sharded_offsets)
        expert_axis = (prepended, self.ep_group.rank(), self.ep_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                expert_axis,
                replica_id=(0, 0, self.expt_dp_group.rank()),
                prepend_axis_num=prepended,
            )
            for name, parameter in self.named_parameters()
        }
