"""DeepSeek-V3 routing on Megatron-Core's TopKRouter, with exact bookkeeping for packed batches.

Shapes: S sequence, B batch, E experts, N = S*B tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vpmoe.model.precision import without_narrowing
from megatron_vpmoe.model.recompute import chosen_once, is_recomputing
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.ranges import annotated


def sequence_balance_loss(
    scores_SBE: Tensor,
    routing_map_SBE: Tensor,
    real_SB: Tensor,
    *,
    topk: int,
    coefficient: float,
    sequence_group: ProcessGroup | None = None,
) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss, times the number of real tokens, summed over the batch.

    Per sequence of T real tokens: T * coefficient * sum_e f_e P_e with f_e = E/(topk*T) * (tokens whose unbiased top-k
    holds e) and P_e the mean normalised score (DeepSeek-V3, arXiv 2412.19437, eq. 17-20). Weighting by T makes the sum
    over any split of the global batch, divided by its real tokens, the same number.

    Args:
        scores_SBE: normalised scores, fp32.
        routing_map_SBE: bool, the unbiased top-k.
        real_SB: bool, False on padding.
        sequence_group: the ranks that hold the other parts of these sequences (sequence parallelism); each then
            computes the whole loss and its part's gradient.

    Returns:
        0-d fp32.
    """
    experts = scores_SBE.shape[-1]
    real_SB1 = real_SB.unsqueeze(-1)
    scores_BE = (scores_SBE * real_SB1).sum(0)
    tokens_BE = (routing_map_SBE & real_SB1).sum(0).to(scores_BE.dtype)
    real_B = real_SB.sum(0)
    if sequence_group is not None:
        scores_BE = reduce_from_tensor_model_parallel_region(scores_BE, group=sequence_group)
        torch.distributed.all_reduce(tokens_BE, group=sequence_group)
        torch.distributed.all_reduce(real_B, group=sequence_group)
    real_B = real_B.clamp(min=1)
    return ((scores_BE * tokens_BE).sum(-1) * (experts * coefficient / topk) / real_B).sum()


class _Replay:
    """Upstream's hook around the top-k: a recomputed pass sends every token where the first pass sent it, and where
    routing is replayed, both send it where it was sent then.

    Upstream's fused kernel (``moe_router_fusion``) chooses by itself and does not ask.
    """

    def __init__(self, router: VPMoERouter) -> None:
        self._router = router

    def get_replay_topk(
        self,
        scores_NE: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        choose: Callable[[Tensor, int, int | None, int | None], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores and int64 experts [N, topk]."""
        router = self._router

        def choice() -> Tensor:
            chosen = choose(scores_NE.detach(), topk, num_groups, group_topk)[1]
            if router.replayed is not None:
                before, known = router.replayed
                chosen = torch.where(known, before.long(), chosen)
            return chosen.to(torch.int16)

        chosen = chosen_once(router, choice).long()
        if router.recorded is not None:
            router.recorded.append(chosen)
        return scores_NE.gather(1, chosen), chosen


class VPMoERouter(TopKRouter):
    """Top-k routing with sigmoid scores, groups and expert bias; padding is no load and has no balance loss.

    Buffers besides upstream's ``expert_bias``: ``tokens_per_expert`` [E] and ``balance_loss_sum`` [], both fp32 and not
    saved, accumulate over the micro-batches of a step until the loop reads and resets them. The router has no bias.

    Set by ``replay`` for the passes of a block: ``replayed``, experts [N, K] and whether they are known [N, 1], and
    ``recorded``, which receives those of each pass, int64 [N, K].
    """

    config: VPTransformerConfig
    tokens_per_expert: Tensor
    balance_loss_sum: Tensor
    replayed: tuple[Tensor, Tensor] | None = None
    recorded: list[Tensor] | None = None

    def __init__(self, config: VPTransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.bias = None
        device = self.weight.device
        experts = config.num_moe_experts
        assert experts is not None
        self.register_buffer("tokens_per_expert", torch.zeros(experts, device=device), persistent=False)
        self.register_buffer("balance_loss_sum", torch.zeros((), device=device), persistent=False)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Upstream's: the logits of ``input`` [S, B, H], then ``routing``."""
        with annotated("router"):
            return super().forward(input, padding_mask)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: fp32 [S, B, E].
            padding_mask: bool [S, B], True on padding.

        Returns:
            weights [N, E] (zero where not routed) and the bool map [N, E].
        """
        config = self.config
        experts = logits.shape[-1]
        probs, routing_map = topk_routing_with_score_function(
            logits.view(-1, experts),
            self.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=config.moe_router_fusion,
            router_replay=cast(Any, _Replay(self)),
        )
        if not (self.training and torch.is_grad_enabled()):
            return probs, routing_map
        real_SB = torch.ones_like(logits[..., 0], dtype=torch.bool) if padding_mask is None else ~padding_mask
        self._count(routing_map, real_SB)
        return self._with_balance_loss(probs, logits, real_SB), routing_map

    def _count(self, routing_map: Tensor, real_SB: Tensor) -> None:
        if is_recomputing():
            return
        with torch.no_grad():
            load = (routing_map & real_SB.reshape(-1, 1)).sum(0)
            self.tokens_per_expert += load
            if self.local_tokens_per_expert is not None:
                self.local_tokens_per_expert += load

    def _with_balance_loss(self, probs: Tensor, logits: Tensor, real_SB: Tensor) -> Tensor:
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if coefficient == 0:
            return probs
        unbiased_map, scores = compute_routing_scores_for_aux_loss(
            logits.view(-1, logits.shape[-1]), self.topk, self.score_function
        )
        loss = sequence_balance_loss(
            scores.view_as(logits),
            unbiased_map.view_as(logits),
            real_SB,
            topk=self.topk,
            coefficient=coefficient,
            sequence_group=self.tp_group if self.config.sequence_parallel else None,
        )
        if not is_recomputing():
            self.balance_loss_sum += loss.detach()
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Keep the bookkeeping and the expert bias in fp32 through ``.bfloat16()``: a bias step of 1e-3 needs it."""
        kept = [buffer for buffer in self.buffers(recurse=False) if buffer.dtype == torch.float32]
        return super()._apply(without_narrowing(fn, kept), recurse)
