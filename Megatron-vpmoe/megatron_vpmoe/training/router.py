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
    """Collects what the routers and experts counted over one step's micro-batches and turns it into metrics.

    Nothing is computed and no value leaves the device before ``metrics``: one all-reduce for all layers together.

    Args:
        model: the bare model, or this rank's part of it; a dense one has no routers and yields no metrics.
        cfg: ``logging.moe_per_layer_logging``.
    """

    def __init__(self, model: VPModel, cfg: RunConfig) -> None:
        self._experts, self._has_bias = cfg.moe.num_experts or 0, cfg.moe.moe_router_enable_expert_bias
        self._per_layer = cfg.logging.moe_per_layer_logging
        numbers = range(1, cfg.model.num_layers + 1)
        self._numbers = [n for n in numbers if cfg.moe.num_experts is not None and cfg.is_moe_layer(n)]
        # A router knows its layer's number from the MoE layer that holds it.
        found = [module for module in model.decoder.modules() if isinstance(module, MoELayer)]
        self._layers = {cast(int, layer.layer_number): layer for layer in found}

    def reset(self) -> None:
        """Start counting a new step."""
        for layer in self._layers.values():
            router = _router(layer)
            router.tokens_per_expert.zero_()
            router.balance_loss_sum.zero_()

    def metrics(self, real_tokens: float) -> dict[str, float]:
        """Health of the step since ``reset``, by the tags of docs/architecture.md; a collective of all ranks.

        Args:
            real_tokens: tokens of the global batch, which normalise the balance loss.
        """
        if not self._numbers:
            return {}
        load_LE, bias_LE, balance_L = self._of_all_ranks()
        tags = router_health(load_LE, expert_bias_LE=bias_LE, layer_numbers=self._numbers, per_layer=self._per_layer)
        return {**tags, "moe/seq_aux_loss": balance_L.sum().item() / max(real_tokens, 1.0)}

    def _of_all_ranks(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Sums over the ranks that hold different tokens, and over the stages that hold different layers: all ranks.

        An expert bias, which is equal on every rank of a stage, is contributed by one of them.
        """
        # Tensor-parallel ranks routed different parts of a sequence, but each has the whole balance loss.
        copies = parallel_state.get_tensor_model_parallel_world_size()
        owns_bias = (
            parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        rows: list[Tensor | None] = []
        for number in self._numbers:
            if number not in self._layers:
                rows.append(None)
                continue
            router = _router(self._layers[number])
            load_E = router.tokens_per_expert
            bias_E = cast(Tensor, router.expert_bias) if self._has_bias and owns_bias else torch.zeros_like(load_E)
            balance = router.balance_loss_sum.double()[None] / copies
            rows.append(torch.cat([load_E.double(), bias_E.double(), balance]))
        empty = torch.zeros(2 * self._experts + 1, dtype=torch.float64, device=current_device())
        packed = torch.stack([empty if row is None else row for row in rows])
        torch.distributed.all_reduce(packed)
        load_LE, bias_LE, balance_L1 = packed.cpu().split([self._experts, self._experts, 1], dim=1)
        return load_LE, bias_LE if self._has_bias else None, balance_L1


def _router(layer: MoELayer) -> VPMoERouter:
    return cast(VPMoERouter, layer.router)
