"""The router's health read off the model: loads of the whole global batch, and the thresholds on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.model.moe.router_health import router_health

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


class RouterMonitor:
    """Collects what the routers counted over one step's micro-batches and turns it into metrics.

    Args:
        model: the bare model; a dense one has no routers and yields no metrics.
        cfg: ``logging.moe_per_layer_logging``.
    """

    def __init__(self, model: VPModel, cfg: RunConfig) -> None:
        self._per_layer = cfg.logging.moe_per_layer_logging
        # A router knows its layer's number from the MoE layer that holds it.
        found = [module for module in model.decoder.modules() if isinstance(module, VPMoERouter)]
        self._routers = {cast(int, router.layer_number): router for router in found}

    def reset(self) -> None:
        """Start counting a new step."""
        for router in self._routers.values():
            router.tokens_per_expert.zero_()
            router.balance_loss_sum.zero_()

    def metrics(self, real_tokens: float) -> dict[str, float]:
        """Health of the step since ``reset``, by the tags of docs/architecture.md; a collective.

        Args:
            real_tokens: tokens of the global batch, which normalise the balance loss.
        """
        if not self._routers:
            return {}
        routers = list(self._routers.values())
        load_LE = torch.stack([router.tokens_per_expert for router in routers])
        balance_L = torch.stack([router.balance_loss_sum for router in routers])
        packed = torch.cat([load_LE, balance_L.unsqueeze(1)], dim=1).double()
        # Tensor-parallel ranks routed different parts of a sequence (sequence parallelism); each has its whole loss.
        packed[:, -1] /= parallel_state.get_tensor_model_parallel_world_size()
        everyone = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(packed, group=everyone)
        biases = [cast(Tensor, router.expert_bias) for router in routers if router.enable_expert_bias]
        tags = router_health(
            packed[:, :-1].cpu(),
            expert_bias_LE=torch.stack(biases).cpu() if biases else None,
            layer_numbers=list(self._routers),
            per_layer=self._per_layer,
        )
        return {**tags, "moe/seq_aux_loss": packed[:, -1].sum().item() / max(real_tokens, 1.0)}
