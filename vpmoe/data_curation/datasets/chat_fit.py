"""Conversations of several turns: what of them is read together, and cutting that to a length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from vpmoe.harmony.renderer import RenderedConversation, RenderedMessage
from vpmoe.harmony.truncation import Fitted, make_fit
from vpmoe.tokenizer.interface import Tokenizer

_SEPARATOR_TOKENS = 1


class AsRead(NamedTuple):
    """A conversation as a model reads it when it gives the last answer, and how many of its last turns are new."""

    conversation: RenderedConversation
    turns: int


def as_read(conversation: RenderedConversation) -> list[AsRead]:
    """What has to be read for each turn to be answered once as in a chat, where no earlier analysis is there any more.

    Harmony's rule: analysis is for the answer that it leads to, and goes once that is given. So a turn with an analysis
    is the last of what is read, and turns without one are read together with the next that has one.

    Args:
        conversation: ``[system] [developer] (user [analysis] final)+``.
    """
    found: list[AsRead] = []
    earlier: list[RenderedMessage] = []
    new: list[RenderedMessage] = []
    last = conversation.messages[-1]
    for message in conversation.messages:
        new.append(message)
        if message.channel == "final" and (message is last or any(one.channel == "analysis" for one in new)):
            ended = replace(message, terminator=last.terminator)
            turns = sum(one.role == "user" for one in new)
            found.append(AsRead(RenderedConversation((*earlier, *new[:-1], ended)), turns))
            earlier += [one for one in new if one.channel != "analysis"]
            new = []
    return found


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
