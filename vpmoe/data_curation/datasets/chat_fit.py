"""Cutting conversations of several turns to a length: oldest turns first, then the rules of a single turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vpmoe.harmony.renderer import RenderedConversation
from vpmoe.harmony.truncation import Fitted, make_fit
from vpmoe.tokenizer.interface import Tokenizer

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
        return FittedChat(fit_turn(conversation), turns_dropped)

    return fit


def without_oldest_turn(conversation: RenderedConversation) -> RenderedConversation | None:
    """The conversation without its first user message and what answers it; None if that is its only turn."""
    users = [index for index, message in enumerate(conversation.messages) if message.role == "user"]
    if len(users) < 2:
        return None
    return RenderedConversation(conversation.messages[: users[0]] + conversation.messages[users[1] :])
