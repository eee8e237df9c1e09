"""Which tokens may follow: an automaton over token ids, so that only what it accepts can be sampled.

Shapes: S states, V vocabulary, B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_vpmoe.errors import DataError

_NEVER = 32767


@dataclass(frozen=True, eq=False)
class TokenGrammar:
    """A deterministic automaton that starts in state 0 behind the prompt.

    A token may be chosen if a complete sequence can still be reached within the tokens that a row has left: whatever is
    generated is complete, and generation ends where it is.

    Attributes:
        following_SV: integers, the state after each token in each state; -1: it may not follow.
        accepting: states in which a sequence is complete.
        cost_SV: int16, tokens that are needed after each token in each state; 32767: it may not follow.
    """

    following_SV: np.ndarray
    accepting: frozenset[int]
    cost_SV: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        states = len(self.following_SV)
        successors = [np.unique(row[row >= 0]) for row in self.following_SV]
        missing = np.full(states + 1, _NEVER, dtype=np.int16)  # the last is where -1 leads
        missing[list(self.accepting)] = 0
        for _ in range(states):
            for state, after in enumerate(successors):
                if len(after):
                    missing[state] = min(missing[state], 1 + min(_NEVER - 1, missing[after].min()))
        object.__setattr__(self, "cost_SV", missing[self.following_SV])

    def check(self, vocabulary: int, max_new_tokens: int) -> None:
        """Refuse what nothing could be sampled with.

        Raises:
            DataError: the automaton knows more tokens than the model, or the limit comes before a sequence can end.
        """
        tokens, shortest = self.cost_SV.shape[1], 1 + int(self.cost_SV[0].min())
        if tokens > vocabulary or max_new_tokens < shortest:
            raise DataError(
                f"a grammar of {tokens} tokens whose shortest sequence has {shortest}, for a model of {vocabulary} "
                f"tokens and at most {max_new_tokens} new ones",
                remedy="take the grammar of the model's own tokenizer, and raise max_new_tokens",
            )


class AllowedTokens:
    """A grammar on a device, for a model's padded vocabulary. Its table takes 2 S V bytes."""

    def __init__(self, grammar: TokenGrammar, vocabulary: int, device: torch.device) -> None:
        padding = ((0, 0), (0, vocabulary - grammar.cost_SV.shape[1]))
        self._cost_SV = torch.from_numpy(np.pad(grammar.cost_SV, padding, constant_values=_NEVER)).to(device)

    def __call__(self, state_B: Tensor, left_B: Tensor) -> Tensor:
        """Bool [B, V]: what may follow in these states with so many tokens left, the next one included.

        A row that has none left (a filler) may take any.
        """
        left_B1 = left_B.clamp(max=_NEVER).unsqueeze(1)
        return (self._cost_SV.index_select(0, state_B) < left_B1) | (left_B1 < 1)
