"""Which tokens may follow: an automaton over token ids, so that only what it accepts can be sampled.

Shapes: S states, V vocabulary, B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_vpmoe.errors import DataError


@dataclass(frozen=True, eq=False)
class TokenGrammar:
    """A deterministic automaton that starts in state 0 behind the prompt.

    A token may be chosen if it can still be completed within the tokens that a row has left, so whatever is generated
    is accepted, and generation ends where it is.

    Attributes:
        following_SV: integers, the state after each token in each state; -1: it may not follow.
        accepting: states in which a sequence is complete.
    """

    following_SV: np.ndarray
    accepting: frozenset[int]
    _missing_S: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        states = len(self.following_SV)
        successors = [np.unique(row[row >= 0]) for row in self.following_SV]
        missing = np.full(states, np.iinfo(np.int32).max // 2, dtype=np.int32)
        missing[list(self.accepting)] = 0
        for _ in range(states):
            nearer = [1 + missing[after].min() if len(after) else missing[s] for s, after in enumerate(successors)]
            missing = np.minimum(missing, nearer)
        object.__setattr__(self, "_missing_S", missing)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence."""
        return int(self._missing_S[0])

    def check(self, vocabulary: int, max_new_tokens: int) -> None:
        """Refuse what nothing could be sampled with.

        Raises:
            DataError: the automaton knows more tokens than the model, or the budget ends before any sequence does.
        """
        if self.following_SV.shape[1] > vocabulary or max_new_tokens < self.shortest:
            raise DataError(
                f"a grammar of {self.following_SV.shape[1]} tokens whose shortest sequence has {self.shortest}, for a "
                f"model of {vocabulary} tokens and at most {max_new_tokens} new ones",
                remedy="take the grammar of the model's own tokenizer, and raise max_new_tokens",
            )

    def following(self, state: int, token: int) -> int:
        """The state after a token that may follow."""
        return int(self.following_SV[state, token])


class AllowedTokens:
    """A grammar on a device, for a model's padded vocabulary."""

    def __init__(self, grammar: TokenGrammar, vocabulary: int, device: torch.device) -> None:
        padding = vocabulary - grammar.following_SV.shape[1]
        following = np.pad(grammar.following_SV, ((0, 0), (0, padding)), constant_values=-1)
        # One state more, without an end: where what may not follow leads.
        self._following_SV = torch.from_numpy(np.where(following < 0, len(following), following)).to(device)
        self._missing_S = torch.from_numpy(np.append(grammar._missing_S, np.iinfo(np.int32).max)).to(device)

    def __call__(self, state_B: Tensor, left_B: Tensor) -> Tensor:
        """Bool [B, V]: what may follow in these states with so many tokens left, the next one included."""
        following_BV = self._following_SV.index_select(0, state_B).long()
        return self._missing_S[following_BV] < left_B.unsqueeze(1)
