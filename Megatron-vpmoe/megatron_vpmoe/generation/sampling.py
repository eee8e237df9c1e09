"""How the next token is chosen: greedily, or as the inverse of a cumulative distribution at one uniform number.

The uniform number is a hash of (seed, prompt, sample, position), so a draw is the same alone, in a batch, in another
order, on other ranks and after a resume. The distribution is accumulated in the order of the vocabulary and not by
probability: a rounding error then moves a border by itself, and does not exchange two tokens that are as likely.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vpmoe.errors import DataError

COLDEST = 1e-6
"""Temperature above 0 at which fp32 still holds logits divided by it."""


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose the next token, and when to stop.

    The filters apply in the order top_k, top_p, min_p, each to what the one before has left, renormalised.

    Attributes:
        max_new_tokens: tokens generated at most, the stop token included.
        stop_ids: tokens that end a sequence.
        temperature: 0 is greedy; otherwise, from 1e-6 on, the logits are divided by it.
        top_p: sample among the most likely tokens whose probabilities sum to at least this (nucleus sampling).
        seed: of the draws.
        top_k: sample among so many most likely tokens (more where the last of them ties); None: all.
        min_p: sample among the tokens at least this times as likely as the most likely one.
        samples: completions of each prompt.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int | None = None
    min_p: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        usable = (
            (self.temperature == 0 or COLDEST <= self.temperature < float("inf"))
            and 0 < self.top_p <= 1
            and 0 <= self.min_p <= 1
            and (self.top_k is None or self.top_k >= 1)
            and min(self.max_new_tokens, self.samples) >= 1
        )
        if not usable:
            raise DataError(
                f"unusable sampling options: {self}",
                remedy=f"temperature 0 or >= {COLDEST}, 0 < top_p <= 1, 0 <= min_p <= 1; "
                "top_k, samples and max_new_tokens >= 1",
            )


class Chosen(NamedTuple):
    """The next token of each row, int64 [B], and its log-probabilities, fp32 [B].

    ``as_sampled`` is that of the distribution that was drawn from (0 where greedy), ``untempered`` the model's own.
    """

    token: Tensor
    as_sampled: Tensor
    untempered: Tensor


def choose(
    logits_BV: Tensor,
    options: SamplingOptions,
    uniform_B: Tensor,
    allowed_BV: Tensor | None = None,
    given_B: Tensor | None = None,
) -> Chosen:
    """The next token of each row.

    Args:
        logits_BV: fp32.
        options: temperature and filters.
        uniform_B: fp64 in [0, 1); not read where greedy.
        allowed_BV: bool, which tokens may be chosen, at least one a row; None: all.
        given_B: int64, the tokens, where nothing is to be chosen; only where greedy.
    """
    free_BV = logits_BV if allowed_BV is None else logits_BV.masked_fill(~allowed_BV, -torch.inf)
    if options.temperature == 0:
        best_B = free_BV.argmax(-1)
        token_B = best_B if given_B is None else given_B
        as_sampled_B = torch.where(token_B == best_B, 0.0, -torch.inf)
    else:
        cumulative_BV = torch.softmax(_filtered(free_BV / options.temperature, options), -1).double().cumsum(-1)
        total_B = cumulative_BV[:, -1]
        # Below the total even after rounding: what is found then has a probability.
        point_B = (uniform_B * total_B).minimum(torch.nextafter(total_B, torch.zeros_like(total_B)))
        token_B = torch.searchsorted(cumulative_BV, point_B.unsqueeze(1), right=True).squeeze(1)
        token_B.clamp_(max=logits_BV.shape[1] - 1)  # beyond it among NaN alone, which whoever gets them has to refuse
        upper_B, lower_B = _at(cumulative_BV, token_B), _at(cumulative_BV, (token_B - 1).clamp(min=0))
        as_sampled_B = (torch.where(token_B > 0, upper_B - lower_B, upper_B) / total_B).log().float()
    return Chosen(token_B, as_sampled_B, _at(logits_BV.log_softmax(-1), token_B))


def _filtered(scaled_BV: Tensor, options: SamplingOptions) -> Tensor:
    """The logits, -inf where top-k, top-p or min-p leave a token out."""
    if options.top_k is not None and options.top_k < scaled_BV.shape[1]:
        last_B1 = scaled_BV.topk(options.top_k).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < last_B1, -torch.inf)
    if options.top_p == 1 and options.min_p == 0:
        return scaled_BV
    probs_BV = torch.softmax(scaled_BV, -1)
    threshold_B1 = probs_BV.amax(-1, keepdim=True) * options.min_p
    if options.top_p < 1:
        sorted_BV = probs_BV.sort(-1, descending=True).values
        # A token stays while the mass before it is below top_p; the most likely one always does.
        kept_B1 = (sorted_BV.double().cumsum(-1) - sorted_BV < options.top_p).sum(-1, keepdim=True)
        threshold_B1 = threshold_B1.maximum(sorted_BV.gather(1, (kept_B1 - 1).clamp(min=0)))
    return scaled_BV.masked_fill(probs_BV < threshold_B1, -torch.inf)


def _at(x_BV: Tensor, token_B: Tensor) -> Tensor:
    return x_BV.gather(1, token_B.unsqueeze(1)).squeeze(1)
