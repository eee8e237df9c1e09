"""DeepSeek-V3 routing on Megatron-Core's TopKRouter, with exact bookkeeping for packed batches.

Shapes: S sequence, B batch, E experts, K experts a token, N = S*B tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_vpmoe.model.compilation import part
from megatron_vpmoe.model.moe.real_tokens import RealTokens
from megatron_vpmoe.model.precision import multiplies_narrow, wide_product, without_narrowing
from megatron_vpmoe.model.recompute import chosen_once, is_recomputing
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.ranges import annotated

_TINY = 1e-20
"""Upstream's, against a division by 0."""


def chosen_experts(score_NE: Tensor, topk: int, groups: int | None, group_topk: int | None) -> Tensor:
    """The ``topk`` best of each token, int64 [N, K]; of equal ``groups``, if any, only in its ``group_topk`` best.

    A group is as good as its topk / group_topk best members together (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    With as many groups as experts that is its best member, the best experts lie in the best groups, and nothing is left
    to limit.
    """
    if groups is not None and group_topk is not None and group_topk < topk:
        grouped = score_NE.unflatten(1, (groups, -1))
        best = grouped.topk(topk // group_topk).values.sum(-1)
        closed = torch.full_like(best, -torch.inf).scatter_(1, best.topk(group_topk, sorted=False).indices, 0.0)
        score_NE = (grouped + closed.unsqueeze(2)).flatten(1)
    return score_NE.topk(topk).indices


def weights_at(score_NE: Tensor, chosen_NK: Tensor, score_function: str, scaling: float | None) -> Tensor:
    """[N, K]: the weights of the chosen experts, which add up to ``scaling``; one sigmoid alone is its own weight.

    Args:
        score_NE: sigmoids; of "softmax" the logits.
        chosen_NK: int64.
        score_function: "sigmoid" or "softmax".
        scaling: None: 1.
    """
    weight = score_NE.gather(1, chosen_NK)
    if score_function == "softmax":
        weight = weight.softmax(-1)
    elif chosen_NK.shape[1] > 1:
        weight = weight / (weight.sum(-1, keepdim=True) + _TINY)
    return weight * scaling if scaling else weight


def sequence_balance_loss(
    score_SBE: Tensor,
    total_SB: Tensor,
    chosen_BSK: Tensor,
    real: RealTokens,
    *,
    coefficient: float,
    sequence_group: ProcessGroup | None = None,
) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss, times the number of real tokens, summed over the batch.

    Per sequence of T real tokens: T * coefficient * sum_e f_e P_e with f_e = E/(topk*T) * (tokens whose unbiased top-k
    holds e) and P_e the mean normalised score (DeepSeek-V3, arXiv 2412.19437, eq. 17-20). Weighting by T makes the sum
    over any split of the global batch, divided by its real tokens, the same number.

    Args:
        score_SBE: scores, fp32.
        total_SB: what a token's scores are divided by: their sum.
        chosen_BSK: int64, the unbiased top-k, by sequence.
        real: which tokens are real.
        sequence_group: the ranks that hold the other parts of these sequences (sequence parallelism); each then
            computes the whole loss and its part's gradient.

    Returns:
        0-d fp32.
    """
    factor = coefficient * score_SBE.shape[-1] / chosen_BSK.shape[-1]
    share_SB = real.share_SB(factor, total_SB.dtype, sequence_group) / total_SB
    scores_BE = torch.bmm(share_SB.t().unsqueeze(1), score_SBE.transpose(0, 1)).squeeze(1)
    scores_BE = scores_BE.to(torch.promote_types(scores_BE.dtype, real.of_BN.dtype))
    # Whole numbers: in whatever order they are added, the sum is one.
    tokens_BE = torch.zeros_like(scores_BE).scatter_add_(1, chosen_BSK.flatten(1), real.of_BN.to(scores_BE.dtype))
    if sequence_group is not None:
        scores_BE = reduce_from_tensor_model_parallel_region(scores_BE, group=sequence_group)
        torch.distributed.all_reduce(tokens_BE, group=sequence_group)
    return torch.dot(scores_BE.flatten(), tokens_BE.flatten())


class _Logits(Function):
    """x W^T in a wider precision than that of x, which is kept as it is; so is the sum of the weight's gradient.

    A GPU multiplies bf16 and adds up in fp32. The weight's gradient there is of two bf16 parts of the logits', 16 bits
    of theirs together: as exact as fp32 to a part in 65,000, and several times as fast.
    """

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weight_EH: Tensor, wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_NH, weight_EH)
        return wide_product(x_NH, weight_EH.t(), wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x_NH, weight_EH = ctx.saved_tensors
        wide = grad_NE.dtype
        if not multiplies_narrow(x_NH, wide):
            grad_x = grad_NE @ weight_EH.to(wide)
            return grad_x.to(x_NH.dtype), (grad_NE.t() @ x_NH.to(wide)).to(weight_EH.dtype), None
        high = grad_NE.to(x_NH.dtype)
        low = (grad_NE - high).to(x_NH.dtype)
        grad_weight = wide_product(high.t(), x_NH, wide) + wide_product(low.t(), x_NH, wide)
        return high @ weight_EH, grad_weight.to(weight_EH.dtype), None


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
        """As upstream's dispatchers want it: what ``choose`` gives, as weights [N, E] (0 where not routed) and a bool
        map [N, E]."""
        real = None if padding_mask is None else RealTokens(padding_mask.t(), self.topk)
        weight_NK, chosen_NK = self.choose(input, real)
        dense_NE = weight_NK.new_zeros(len(weight_NK), cast(int, self.config.num_moe_experts))
        routed_NE = torch.zeros_like(dense_NE, dtype=torch.bool).scatter_(1, chosen_NK, True)
        return dense_NE.scatter(1, chosen_NK, weight_NK), routed_NE

    def choose(self, hidden_SBH: Tensor, real: RealTokens | None = None) -> tuple[Tensor, Tensor]:
        """The experts of each token.

        Args:
            hidden_SBH: tokens.
            real: which of them are; None: all.

        Returns:
            weights and int64 experts, [N, K] each.
        """
        score_SBE = self.scores(hidden_SBH)
        real = real or RealTokens.all_of(score_SBE, self.topk)
        chosen_NK = self.chosen(score_SBE, real)
        with annotated("router"):
            weight_NK, loss = self.weighed(score_SBE, chosen_NK, real)
        return self.with_loss(weight_NK, loss), chosen_NK

    def scores(self, hidden_SBH: Tensor) -> Tensor:
        """[S, B, E] in the router's precision: sigmoids; of "softmax" the logits."""
        with annotated("router"):
            logits_SBE = self.gating(hidden_SBH)
            return logits_SBE.sigmoid() if self.score_function == "sigmoid" else logits_SBE

    def chosen(self, score_SBE: Tensor, real: RealTokens) -> Tensor:
        """int64 [N, K], counted in training; a recomputed pass sends every token where the first pass sent it, and
        where routing is replayed, both send it where it was sent then."""
        with annotated("router"), torch.no_grad():
            best = part(VPMoERouter.best, self.training and self.config.compiled == "step")
            chosen_NK = chosen_once(self, lambda: best(self, score_SBE.flatten(0, -2)))
            if self.recorded is not None:
                self.recorded.append(chosen_NK)
        if self.training and torch.is_grad_enabled():
            self._count(chosen_NK, real)
        return chosen_NK

    def weighed(self, score_SBE: Tensor, chosen_NK: Tensor, real: RealTokens) -> tuple[Tensor, Tensor | None]:
        """Weights [N, K] of the chosen experts, and the balance loss, if one is asked."""
        scaling = self.config.moe_router_topk_scaling_factor
        weight_NK = weights_at(score_SBE.flatten(0, -2), chosen_NK, self.score_function, scaling)
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if coefficient == 0 or not (self.training and torch.is_grad_enabled()):
            return weight_NK, None
        if self.score_function == "softmax":
            score_SBE = score_SBE.softmax(-1, dtype=torch.float32)
        loss = sequence_balance_loss(
            score_SBE,
            score_SBE.sum(-1) + _TINY,
            score_SBE.detach().transpose(0, 1).topk(self.topk, sorted=False).indices,
            real,
            coefficient=coefficient,
            sequence_group=self._sequence_group,
        )
        return weight_NK, loss

    def make(self, real: RealTokens, dtype: torch.dtype) -> None:
        """All that ``weighed`` reads of the real tokens, for scores of ``dtype``: what is compiled makes none of it."""
        experts = cast(int, self.config.num_moe_experts)
        factor = self.get_aux_loss_coeff("seq_aux_loss") * experts / self.topk
        _ = real.of_BN, real.share_SB(factor, dtype, self._sequence_group)

    @property
    def _sequence_group(self) -> ProcessGroup | None:
        return self.tp_group if self.config.sequence_parallel else None

    def with_loss(self, x: Tensor, loss: Tensor | None) -> Tensor:
        """``x``, through which the loss gets its gradient; never compiled, as upstream sets its scale afterwards."""
        if loss is None:
            return x
        if not is_recomputing():
            self.balance_loss_sum += loss.detach()
        return cast(Tensor, MoEAuxLossAutoScaler.apply(x, loss))

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., E] in ``moe_router_dtype`` of tokens [..., H]."""
        wide = {"fp32": torch.float32, "fp64": torch.float64, None: input.dtype}[self.config.moe_router_dtype]
        logits = cast(Tensor, _Logits.apply(input.flatten(0, -2), self.weight, wide))
        return logits.view(*input.shape[:-1], -1)

    def best(self, score_NE: Tensor) -> Tensor:
        """int64 [N, K]: of biased scores, but where routing is replayed."""
        ranked_NE = score_NE if self.expert_bias is None else score_NE + self.expert_bias
        groups = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        chosen = chosen_experts(ranked_NE, self.topk, *groups)
        if self.replayed is not None:
            before, known = self.replayed
            chosen = torch.where(known, before.long(), chosen)
        return chosen

    def _count(self, chosen_NK: Tensor, real: RealTokens) -> None:
        if is_recomputing():
            return
        with torch.no_grad():
            for loads in (self.tokens_per_expert, self.local_tokens_per_expert):
                if loads is not None:
                    loads.scatter_add_(0, chosen_NK.flatten(), real.of_NK.to(loads.dtype))  # whole numbers, as above

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Keep the bookkeeping and the expert bias in fp32 through ``.bfloat16()``: a bias step of 1e-3 needs it."""
        kept = [buffer for buffer in self.buffers(recurse=False) if buffer.dtype == torch.float32]
        return super()._apply(without_narrowing(fn, kept), recurse)
