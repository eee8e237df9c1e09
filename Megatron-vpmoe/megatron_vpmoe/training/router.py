"""The router's health read off the model: loads of the whole global batch, and the thresholds on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.model.moe.router_health import router_health
from megatron_vpmoe.runtime.device import current_device

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


class RouterMonitor:
    """Collects what the routers counted over one step's micro-batches and turns it into metrics.

    Nothing is computed and no value leaves the device before ``metrics``: one all-reduce for all layers together.

    Args:
        model: the bare model, or this rank's part of it; a dense one has no routers and yields no metrics.
        cfg: ``logging.moe_per_layer_logging``.

    Attributes:
        load_LE: tokens that each expert of each layer with experts got in the step of the last ``metrics``, float64 on
            the host; None before.
    """

    load_LE: Tensor | None = None

    def __init__(self, model: VPModel, cfg: RunConfig) -> None:
        self._experts, self._has_bias = cfg.moe.num_experts or 0, cfg.moe.moe_router_enable_expert_bias
        self._per_layer = cfg.logging.moe_per_layer_logging
        numbers = range(1, cfg.model.num_layers + 1)
        self._numbers = [n for n in numbers if cfg.moe.num_experts is not None and cfg.is_moe_layer(n)]
        # A router knows its layer's number from the MoE layer that holds it.
        found = [module for module in model.decoder.modules() if isinstance(module, MoELayer)]
        self._routers = {cast(int, layer.layer_number): cast(VPMoERouter, layer.router) for layer in found}

    def reset(self) -> None:
        """Start counting a new step."""
        for router in self._routers.values():
            router.tokens_per_expert.zero_()
            router.balance_loss_sum.zero_()

    def metrics(self, real_tokens: float) -> dict[str, float]:
        """Health of the step since ``reset``, by the tags of docs/metrics.md; a collective of all ranks.

        Args:
            real_tokens: tokens of the global batch, which normalise the balance loss.
        """
        if not self._numbers:
            return {}
        load_LE, bias_LE, balance_L = self._of_all_ranks()
        self.load_LE = load_LE
        tags = router_health(load_LE, expert_bias_LE=bias_LE, layer_numbers=self._numbers, per_layer=self._per_layer)
        return {**tags, "moe/seq_aux_loss": balance_L.sum().item() / max(real_tokens, 1.0)}

    def _of_all_ranks(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Sums over the ranks that hold different tokens, and over the stages that hold different layers: all ranks.

        An expert bias, which is equal on every rank of a stage, is contributed by one of them.
        """
        # Tensor-parallel ranks routed different parts of a sequence (sequence parallelism), but each has the whole
        # balance loss.
        copies = parallel_state.get_tensor_model_parallel_world_size()
        owns_bias = (
            parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        packed = torch.zeros(len(self._numbers), 2 * self._experts + 1, dtype=torch.float64, device=current_device())
        for row, number in zip(packed, self._numbers, strict=True):
            if (router := self._routers.get(number)) is None:
                continue  # another stage's
            load_E, bias_E, balance_1 = row.split([self._experts, self._experts, 1])
            load_E.copy_(router.tokens_per_expert)
            balance_1.copy_(router.balance_loss_sum.double() / copies)
            if self._has_bias and owns_bias:
                bias_E.copy_(cast(Tensor, router.expert_bias))
        torch.distributed.all_reduce(packed)
        load_LE, bias_LE, balance_L1 = packed.cpu().split([self._experts, self._experts, 1], dim=1)
        return load_LE, bias_LE if self._has_bias else None, balance_L1
