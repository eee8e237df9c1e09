"""What a forward pass gives an objective, and the ways to read it; none holds [N, V] in fp32.

``cross_entropy`` and ``weighted_sum``: losses against labels or a teacher's K ids, weighted beforehand (``terms``).
``log_probabilities``: numbers a token to go on calculating with. ``likeliest``: K ids a token, without a gradient. All
run one loop over chunks of tokens (``chunks``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_vpmoe.model.output.likeliest import likeliest
from megatron_vpmoe.model.output.log_probabilities import log_probabilities
from megatron_vpmoe.model.output.terms import CrossEntropy, Divergence, Term, at_places
from megatron_vpmoe.model.output.weighted_sum import weighted_sum

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel

__all__ = ["CrossEntropy", "Divergence", "ModelOutput", "Term", "likeliest", "log_probabilities", "weighted_sum"]


@dataclass(frozen=True)
class ModelOutput:
    """The final hidden states of B rows of S positions, and ways to read them.

    Nothing the size of [B, S, V] exists until it is asked for. Which positions are read is told by a mask, bool [B, S],
    or by their n places in row-major order, int64 [n], as ``Batch.supervised`` has them: of a mask on a GPU the host
    has to wait for n. Results are over those positions in that order, in fp32.

    Attributes:
        hidden_BSH: what the output projection reads.
        model: what made it.
        expert_weight_BSE: of a mixture the weights of its experts, fp32; None of other models.
    """

    hidden_BSH: Tensor
    model: VPModel
    expert_weight_BSE: Tensor | None = None

    def logits(self) -> Tensor:
        """Logits of every position, [B, S, V] in the model's dtype."""
        return self.model.logits(self.hidden_BSH)

    def cross_entropy(self, labels_BS: Tensor, where: Tensor, weight_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of -log p(label) over the chosen positions, and its terms without weights.

        Args:
            labels_BS: int64.
            where: mask or places.
            weight_BS: fp32, the weight of each position in the sum; takes no gradient.

        Returns:
            fp32 0-d, differentiable once; fp32 [n] without gradient.
        """
        total, (told,) = self.weighted_sum(where, [CrossEntropy(labels=labels_BS, weight=weight_BS)])
        return total, told[0]

    def weighted_sum(self, where: Tensor, terms: Sequence[Term]) -> tuple[Tensor, list[Tensor]]:
        """The sum of weighted losses over the chosen positions, and what each term tells of them.

        Args:
            where: mask or places.
            terms: over [B, S]; such as a ``Divergence`` from a teacher beside a ``CrossEntropy``.

        Returns:
            fp32 0-d, differentiable once; for each term fp32 [``tells``, n] without gradient, its losses
            without weights first.
        """
        places_N = places(where)
        chosen = [term.at(places_N) for term in terms]
        return weighted_sum(self._hidden(places_N), self.model.output_weight(), chosen, self.model.pg_collection.tp)

    def log_probabilities(
        self, labels_BS: Tensor, where: Tensor, *, entropy: bool = False, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """log p(label), and if asked for the entropy of p in nats, of the chosen positions; differentiable once.

        Args:
            labels_BS: int64.
            where: mask or places.
            entropy: whether to calculate it.
            temperature: that the logits are divided by first.
        """
        projection, tp_group = self.model.output_weight(), self.model.pg_collection.tp
        places_N = places(where)
        hidden = self._hidden(places_N)
        if temperature != 1:
            hidden = hidden / temperature  # logits are linear in it
        return log_probabilities(hidden, projection, at_places(labels_BS, places_N), tp_group, entropy=entropy)

    def likeliest(
        self, labels_BS: Tensor, where: Tensor, count: int, *, temperature: float = 1.0, among: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ``count`` likeliest ids at the chosen positions, likeliest first, and log p of each and of the label.

        Args:
            labels_BS: int64.
            where: mask or places.
            count: K.
            temperature: that the logits are divided by first.
            among: int64, ascending: the only ids to choose from; None: all.

        Returns:
            int64 [n, K], fp32 [n, K] and [n]; without gradient.
        """
        projection, tp_group = self.model.output_weight(), self.model.pg_collection.tp
        places_N = places(where)
        hidden, labels = at_places(self.hidden_BSH, places_N), at_places(labels_BS, places_N)
        return likeliest(hidden, projection, labels, count, tp_group, temperature=temperature, among=among)

    def _hidden(self, places_N: Tensor) -> Tensor:
        # Each tensor-parallel rank makes the part of the hidden states' gradient that comes from its own words.
        return copy_to_tensor_model_parallel_region(
            at_places(self.hidden_BSH, places_N), group=self.model.pg_collection.tp
        )


def places(where: Tensor) -> Tensor:
    """int64 [n], row-major, of a bool mask, or of itself."""
    return where if where.dtype == torch.int64 else where.flatten().nonzero().squeeze(1)
