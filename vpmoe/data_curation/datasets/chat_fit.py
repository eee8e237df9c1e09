"""Cutting conversations of several turns to a length: oldest turns first, then the rules of a single turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vpmoe.harmony.renderer import RenderedConversation, RenderedMessage
from vpmoe.harmony.truncation import Fitted, make_fit
from vpmoe.tokenizer.interface import Tokenizer

_NO_IDS = np.empty(0, dtype=np.int32)
# Stands where a turn has no analysis; takes no room and never leaves this file.
_NO_ANALYSIS = RenderedMessage("assistant", "analysis", _NO_IDS, _NO_IDS, _NO_IDS)
_SEPARATOR_TOKENS = 1


class FittedChat(NamedTuple):
    """What became of a conversation: as :class:`Fitted`, and how many of its oldest turns went."""

    fitted: Fitted
    turns_dropped: int


def make_chat_fit(tokenizer: Tokenizer, seq_len: int) -> Callable[[RenderedConversation], FittedChat]:
    """``fit`` for conversations ``[system] [developer] (user [analysis] final)+``, <|endoftext|> counted.

    While the conversation is too long and has an earlier turn, the oldest one goes, whole. What then is still too long
    is cut as :func:`vpmoe.harmony.truncation.make_fit` cuts a conversation of one turn.
    """
    fit_turn = make_fit(tokenizer, seq_len)

    def fit(conversation: RenderedConversation) -> FittedChat:
        turns_dropped = 0
        while len(conversation) + _SEPARATOR_TOKENS > seq_len:
            shorter = without_oldest_turn(conversation)
            if shorter is None:
                break
            conversation, turns_dropped = shorter, turns_dropped + 1
        if conversation.messages[-2].channel == "analysis":
            return FittedChat(fit_turn(conversation), turns_dropped)
        *head, final = conversation.messages
        fitted = fit_turn(RenderedConversation((*head, _NO_ANALYSIS, final)))
        kept = fitted.conversation
        if kept is not None:
            kept = RenderedConversation((*kept.messages[:-2], kept.messages[-1]))
        cut = (fitted.analysis_tokens_cut, fitted.user_tokens_cut)
        return FittedChat(Fitted(kept, fitted.branch, *cut), turns_dropped)

    return fit


def without_oldest_turn(conversation: RenderedConversation) -> RenderedConversation | None:
    """The conversation without its first user message and what answers it; None if that is its only turn."""
    users = [index for index, message in enumerate(conversation.messages) if message.role == "user"]
    if len(users) < 2:
        return None
    return RenderedConversation(conversation.messages[: users[0]] + conversation.messages[users[1] :])
