"""Cutting a conversation to a length without ever breaking its structure.

Headers, terminators, system and developer messages and the whole of ``final`` stay. What is too long is taken from the
front of the analysis or, in a turn without one, from the front of the user's text. Something of either has to be left,
and not only blanks: a supervised empty analysis is no valid Harmony, and an answer without its question teaches
nothing. What cannot be cut so is dropped. Cuts fall between characters: a token that begins inside a UTF-8 sequence
goes with the part that is cut away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vpmoe.errors import DataError
from vpmoe.harmony.renderer import RenderedConversation
from vpmoe.tokenizer.interface import TokenArray, Tokenizer

BRANCHES = (
    "whole",
    "analysis_cut",
    "user_cut",
    "dropped_final_too_long",
    "dropped_context_too_long",
)
_SEPARATOR_TOKENS = 1


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of a conversation.

    Attributes:
        conversation: the conversation, at most ``seq_len`` tokens with its separator; None if it was dropped.
        branch: one of :data:`BRANCHES`. ``dropped_final_too_long``: the final message cannot fit even alone;
            ``dropped_context_too_long``: it could, but not beside all that is never cut and some text of what is.
        analysis_tokens_cut: ids taken from the analysis.
        user_tokens_cut: ids taken from the user's text.
    """

    conversation: RenderedConversation | None
    branch: str
    analysis_tokens_cut: int = 0
    user_tokens_cut: int = 0


def make_fit(tokenizer: Tokenizer, seq_len: int) -> Callable[[RenderedConversation], Fitted]:
    """``fit`` for one vocabulary and one length in tokens, the separator <|endoftext|> counted.

    The returned function takes a conversation that ends in a turn ``user [analysis] final``.

    Raises:
        DataError: ``seq_len`` below 1.
    """
    if seq_len < 1:
        raise DataError(f"sequence length {seq_len} holds nothing", source="--seq-len", remedy="use 2048")
    begins_inside_character = _begins_inside_character(tokenizer)

    def suffix(content: TokenArray, keep: int) -> TokenArray:
        """The last ``keep`` ids or a few fewer; none where they hold no text."""
        cut = content[len(content) - max(keep, 0) :]
        cut = cut[np.logical_and.accumulate(begins_inside_character[cut]).sum() :]
        return cut if tokenizer.decode(cut.tolist()).strip() else content[:0]

    def fit(conversation: RenderedConversation) -> Fitted:
        excess = len(conversation) + _SEPARATOR_TOKENS - seq_len
        if excess <= 0:
            return Fitted(conversation, "whole")
        *others, cuttable, final = conversation.messages
        kept = suffix(cuttable.content, len(cuttable.content) - excess)
        if not len(kept):
            alone = len(final) + _SEPARATOR_TOKENS > seq_len
            return Fitted(None, "dropped_final_too_long" if alone else "dropped_context_too_long")
        name = cuttable.channel or cuttable.role
        cut = RenderedConversation((*others, replace(cuttable, content=kept), final))
        return Fitted(cut, f"{name}_cut", **{f"{name}_tokens_cut": len(cuttable.content) - len(kept)})

    return fit


@lru_cache(maxsize=4)
def _begins_inside_character(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """``[padded_vocab_size]``: whether an id's first byte continues a UTF-8 sequence (``10xxxxxx``)."""
    first_bytes = np.array([piece[0] if piece else 0 for piece in tokenizer.pieces()], dtype=np.uint8)
    return (first_bytes & 0xC0) == 0x80
