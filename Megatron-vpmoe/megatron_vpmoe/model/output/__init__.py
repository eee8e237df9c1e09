"""What a forward pass gives an objective, and the ways to read it; none holds [N, V] in fp32.

``cross_entropy`` and ``weighted_sum``: losses against labels or a teacher's K ids, weighted beforehand (``terms``).
``log_probabilities``: numbers a token to go on calculating with. ``likeliest``: K ids a token, without a gradient. All
run one loop over chunks of tokens (``chunks``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_vpmoe.model.output.likeliest import likeliest
from megatron_vpmoe.model.output.log_probabilities import log_probabilities
from megatron_vpmoe.model.output.terms import CrossEntropy, Divergence, Term
from megatron_vpmoe.model.output.weighted_sum import weighted_sum

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel

__all__ = ["CrossEntropy", "Divergence", "ModelOutput", "Term", "likeliest", "log_probabilities", "weighted_sum"]


@dataclass(frozen=True)
class ModelOutput:
    """The final hidden states of B rows of S positions, and ways to read them.

    Nothing the size of [B, S, V] exists until it is asked for. Results over masked positions are [mask.sum()], in
    row-major order, in fp32.
    """

    hidden_BSH: Tensor
    model: VPModel

    def logits(self) -> Tensor:
        """Logits of every position, [B, S, V] in the model's dtype."""
        return self.model.logits(self.hidden_BSH)

    def cross_entropy(self, labels_BS: Tensor, mask_BS: Tensor, weight_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of -log p(label) over the positions where the mask holds, and its terms without weights.

        Args:
            labels_BS: int64.
            mask_BS: bool.
            weight_BS: fp32, the weight of each position in the sum; takes no gradient.

        Returns:
            fp32 0-d, differentiable once; fp32 [mask.sum()] without gradient.
        """
        total, (told,) = self.weighted_sum(mask_BS, [CrossEntropy(labels=labels_BS, weight=weight_BS)])
        return total, told[0]

    def weighted_sum(self, mask_BS: Tensor, terms: Sequence[Term]) -> tuple[Tensor, list[Tensor]]:
        """The sum of weighted losses over the positions where the mask holds, and what each term tells of them.

        Args:
            mask_BS: bool.
            terms: over [B, S]; such as a ``Divergence`` from a teacher beside a ``CrossEntropy``.

        Returns:
            fp32 0-d, differentiable once; for each term fp32 [``tells``, mask.sum()] without gradient, its losses
            without weights first.
        """
        chosen = [term.where(mask_BS) for term in terms]
        return weighted_sum(self._hidden(mask_BS), self.model.output_weight(), chosen, self.model.pg_collection.tp)

    def log_probabilities(
        self, labels_BS: Tensor, mask_BS: Tensor, *, entropy: bool = False, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """log p(label), and if asked for the entropy of p in nats, where the mask holds; differentiable once.

        Args:
            labels_BS: int64.
            mask_BS: bool.
            entropy: whether to calculate it.
            temperature: that the logits are divided by first.
        """
        projection, tp_group = self.model.output_weight(), self.model.pg_collection.tp
        hidden = self._hidden(mask_BS)
        if temperature != 1:
            hidden = hidden / temperature  # logits are linear in it
        return log_probabilities(hidden, projection, labels_BS[mask_BS], tp_group, entropy=entropy)

    def likeliest(
        self, labels_BS: Tensor, mask_BS: Tensor, count: int, *, temperature: float = 1.0, among: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ``count`` likeliest ids where the mask holds, likeliest first, and log p of each and of the label.

        Args:
            labels_BS: int64.
            mask_BS: bool.
            count: K.
            temperature: that the logits are divided by first.
            among: int64, ascending: the only ids to choose from; None: all.

        Returns:
            int64 [mask.sum(), K], fp32 [mask.sum(), K] and [mask.sum()]; without gradient.
        """
        projection, tp_group = self.model.output_weight(), self.model.pg_collection.tp
        hidden, labels = self.hidden_BSH[mask_BS], labels_BS[mask_BS]
        return likeliest(hidden, projection, labels, count, tp_group, temperature=temperature, among=among)

    def _hidden(self, mask_BS: Tensor) -> Tensor:
        # Each tensor-parallel rank makes the part of the hidden states' gradient that comes from its own words.
        return copy_to_tensor_model_parallel_region(self.hidden_BSH[mask_BS], group=self.model.pg_collection.tp)
