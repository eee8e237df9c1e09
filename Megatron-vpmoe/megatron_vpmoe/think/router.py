"""How much of each expert a position takes: softmax over a linear of the running mean of its document so far.

Shapes: B rows, S positions, H hidden, E experts, D documents of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module, functional

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.precision import fp32_island, without_narrowing
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.think.decoding import Entry, Past

_SUM = "sum"


class ExpertRouter(Module):
    """Weights of all experts at every position; means, product and softmax are fp32 or wider.

    A mean is over the tokens of the position's document up to it, itself included.

    Args:
        config: hidden size and initialisation.
        experts: E.

    Attributes:
        recorded: receives the weights [N, E] of each pass, where they are to be told of; None: nobody asks.
    """

    def __init__(self, config: VPTransformerConfig, *, experts: int) -> None:
        super().__init__()
        self.recorded: list[Tensor] | None = None
        self.weight = fp32_island(torch.empty(experts, config.hidden_size))
        if config.perform_initialization and config.init_method is not None:
            config.init_method(self.weight)

    def forward(self, x_BSH: Tensor, layout: SequenceLayout, past: Past | None = None) -> Tensor:
        """fp32 or wider [B, S, E], positive, of sum 1.

        Args:
            x_BSH: hidden states.
            layout: documents and positions.
            past: receives each document's sum, where the row is to be continued.
        """
        wide = self.weight.dtype
        # A product with the mask, not differences of one running sum: another document's numbers do not come in.
        visible_BSS = layout.visible(None).squeeze(1)
        sum_BSH = visible_BSS.to(wide) @ x_BSH.to(wide)
        if past is not None:
            past.put(_SUM, sum_BSH[0, list(past.ends)])
        return self._weights(sum_BSH / visible_BSS.sum(-1, keepdim=True))

    def entries(self) -> dict[str, Entry]:
        """What decoding keeps: the sum; how many were added is the position."""
        return {_SUM: Entry((self.weight.shape[1],), self.weight.dtype)}

    def step(self, x_BH: Tensor, position_B: Tensor, state: dict[str, Tensor]) -> Tensor:
        """[B, E] for one new token a row.

        Args:
            x_BH: hidden states.
            position_B: int64, where it stands in its document.
            state: the sum [B, H], to which the token is added.
        """
        state[_SUM] += x_BH
        return self._weights(state[_SUM] / (position_B + 1).unsqueeze(1))

    def _weights(self, mean: Tensor) -> Tensor:
        weight = torch.softmax(functional.linear(mean, self.weight), -1)
        if self.recorded is not None:
            self.recorded.append(weight.flatten(0, -2))
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertRouter:
        """Moves and casts as usual, except that a cast to bf16 leaves the weight fp32."""
        return super()._apply(without_narrowing(fn, [self.weight, self.weight.grad]), recurse)


def entropy(weight: Tensor) -> Tensor:
    """-Σ w log w in nats over the last dimension; its gradient stays finite where a weight is zero."""
    return -(weight * weight.clamp(min=torch.finfo(weight.dtype).tiny).log()).sum(-1)
