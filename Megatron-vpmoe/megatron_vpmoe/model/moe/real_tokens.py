"""Which tokens of a pass are no padding.

Shapes: S sequence, B batch, E experts, K experts a token, N = S*B tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vpmoe.model.moe.expert_rows import Numbers


@dataclass(frozen=True, eq=False)
class RealTokens:
    """Which tokens are no padding, in the forms that routers read; all is made once for all layers of a pass.

    Attributes:
        padding_BS: bool, True on padding.
        topk: K.
    """

    padding_BS: Tensor
    topk: int

    @classmethod
    def all_of(cls, score_SBE: Tensor, topk: int) -> RealTokens:
        """None is padding."""
        return cls(score_SBE.new_zeros(score_SBE.shape[:2], dtype=torch.bool).t(), topk)

    @cached_property
    def of_SB(self) -> Tensor:
        """fp32, 1 for a token that is real and 0 for another."""
        return (~self.padding_BS).t().float()

    @cached_property
    def of_NK(self) -> Tensor:
        """The same for each choice of each token, [N K]."""
        return self.of_SB.reshape(-1, 1).expand(-1, self.topk).flatten()

    @cached_property
    def of_BN(self) -> Tensor:
        """The same by sequence, [B, S K]."""
        return self.of_SB.t().unsqueeze(-1).expand(-1, -1, self.topk).flatten(1)

    @cached_property
    def numbers(self) -> Numbers:
        """What experts count their rows with."""
        return Numbers(self.padding_BS.device)

    @cached_property
    def _shares(self) -> dict[tuple[float, torch.dtype], Tensor]:
        return {}

    def share_SB(self, factor: float, dtype: torch.dtype, sequence_group: ProcessGroup | None) -> Tensor:
        """``factor`` / T for a real token of a sequence that has T of them, else 0.

        Args:
            factor: the same for all layers, as a rule.
            dtype: of the result.
            sequence_group: the ranks that hold the other parts of the sequences, if any.
        """
        if (factor, dtype) not in self._shares:
            real_B = self.of_SB.sum(0)
            if sequence_group is not None:
                torch.distributed.all_reduce(real_B, group=sequence_group)
            self._shares[factor, dtype] = self.of_SB.to(dtype) * (factor / real_B.clamp(min=1).to(dtype))
        return self._shares[factor, dtype]
