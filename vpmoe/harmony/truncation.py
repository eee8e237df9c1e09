"""Cutting a conversation to a length without ever breaking its structure.

Headers, terminators, system and developer messages and the whole of ``final`` stay. What is too long is taken from the
front of the analysis first, and only when nothing of it is left, from the front of the user's text. A conversation
whose fixed part alone is too long is dropped. Cuts fall between characters: a token that begins inside a UTF-8 sequence
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
    "analysis_emptied",
    "user_cut",
    "user_emptied",
    "dropped_final_too_long",
    "dropped_context_too_long",
)
_SEPARATOR_TOKENS = 1


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of a conversation.

    Attributes:
        conversation: the conversation, at most ``seq_len`` tokens with its separator; None if it was dropped.
        branch: one of :data:`BRANCHES`. ``analysis_emptied``: the analysis is gone and the user's text is whole;
            ``user_cut`` and ``user_emptied``: the analysis is gone too. ``dropped_final_too_long``: the final message
            cannot fit even alone; ``dropped_context_too_long``: it could, but not beside system and developer.
        analysis_tokens_cut: ids taken from the analysis.
        user_tokens_cut: ids taken from the user's text.
    """

    conversation: RenderedConversation | None
    branch: str
    analysis_tokens_cut: int = 0
    user_tokens_cut: int = 0


def make_fit(tokenizer: Tokenizer, seq_len: int) -> Callable[[RenderedConversation], Fitted]:
    """``fit`` for one vocabulary and one length in tokens, the separator <|endoftext|> counted.

    The returned function takes a conversation of the form [system] [developer] user analysis final.

    Raises:
        DataError: ``seq_len`` below 1.
    """
    if seq_len < 1:
        raise DataError(f"sequence length {seq_len} holds nothing", source="--seq-len", remedy="use 2048")
    begins_inside_character = _begins_inside_character(tokenizer)

    def suffix(content: TokenArray, keep: int) -> TokenArray:
        if keep <= 0:
            return content[:0]
        cut = content[len(content) - keep :]
        starts = np.flatnonzero(~begins_inside_character[cut])
        return cut[starts[0] :] if len(starts) else content[:0]

    def fit(conversation: RenderedConversation) -> Fitted:
        excess = len(conversation) + _SEPARATOR_TOKENS - seq_len
        if excess <= 0:
            return Fitted(conversation, "whole")
        *context, user, analysis, final = conversation.messages
        if excess > len(user.content) + len(analysis.content):
            alone = len(final) + _SEPARATOR_TOKENS > seq_len
            return Fitted(None, "dropped_final_too_long" if alone else "dropped_context_too_long")
        kept_analysis = suffix(analysis.content, len(analysis.content) - excess)
        excess -= len(analysis.content)
        kept_user = user.content if excess <= 0 else suffix(user.content, len(user.content) - excess)
        if len(kept_analysis):
            branch = "analysis_cut"
        elif len(kept_user) == len(user.content):
            branch = "analysis_emptied"
        else:
            branch = "user_cut" if len(kept_user) else "user_emptied"
        messages = (*context, replace(user, content=kept_user), replace(analysis, content=kept_analysis), final)
        return Fitted(
            RenderedConversation(messages),
            branch,
            len(analysis.content) - len(kept_analysis),
            len(user.content) - len(kept_user),
        )

    return fit


@lru_cache(maxsize=4)
def _begins_inside_character(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """``[padded_vocab_size]``: whether an id's first byte continues a UTF-8 sequence (``10xxxxxx``)."""
    first_bytes = np.array([piece[0] if piece else 0 for piece in tokenizer.pieces()], dtype=np.uint8)
    return (first_bytes & 0xC0) == 0x80
