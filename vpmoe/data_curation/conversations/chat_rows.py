"""Chat rows -> messages: ``messages``, ``prompt`` + ``completion``, and ``chosen`` against ``rejected``.

A message is ``{"role", "content"}`` with role system, developer, user or assistant, and for the assistant optionally
``channel`` (analysis or final; final where it is absent) and ``thinking``, which becomes an analysis message before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vpmoe.errors import RowError
from vpmoe.harmony.conversation import CHANNELS, ROLES, Message, check_text

_LETTERS = {
    ("system", None): "s",
    ("developer", None): "d",
    ("user", None): "u",
    ("assistant", "analysis"): "a",
    ("assistant", "final"): "f",
}
_CONVERSATION = re.compile("s?d?(ua?f)+")
_COMPLETION = re.compile("a?f")
_EXPECTED = "[system] [developer], then turns of: user [analysis] final"


class Pair(NamedTuple):
    """A prompt and two ways to go on: each ``[analysis] final``."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


def chat_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The conversation of a row with ``messages``, or with ``prompt`` and ``completion``.

    Raises:
        RowError: a field is missing or not usable, or the messages are in no order that is trained on.
    """
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
    elif row.get("prompt") is not None:
        messages = _prompt(row["prompt"], "prompt") + _completion(row.get("completion"), "completion")
    else:
        raise RowError("missing_field", "neither messages nor prompt is there")
    return _checked(messages)


def preference_pair(row: Mapping[str, Any]) -> Pair:
    """The pair of a row with ``prompt`` or ``messages``, ``chosen`` and ``rejected``.

    Where ``chosen`` and ``rejected`` are whole conversations, they have to agree up to their last user message, which
    is then the prompt; a ``prompt`` beside them has to be that message's text or those messages.

    Raises:
        RowError: as :func:`chat_messages`; ``different_prompts``; ``equal_pair``: there is nothing to prefer.
    """
    whole = {side: _messages(row[side], side) for side in ("chosen", "rejected") if _is_whole(row.get(side))}
    if len(whole) == 1:
        raise RowError("different_prompts", f"only {next(iter(whole))} is a whole conversation")
    if whole:
        (prompt, chosen), (other, rejected) = (_split_last_turn(messages) for messages in whole.values())
        said = row.get("prompt")
        if prompt != other or (said is not None and not _says(said, prompt)):
            raise RowError("different_prompts", "prompt, chosen and rejected do not begin with the same messages")
    else:
        field = "prompt" if row.get("prompt") is not None else "messages"
        prompt = _prompt(row.get(field), field)
        chosen, rejected = (_completion(row.get(side), side) for side in ("chosen", "rejected"))
    _checked(prompt + chosen)
    _checked(prompt + rejected)
    if chosen == rejected:
        raise RowError("equal_pair", "chosen and rejected are the same")
    return Pair(prompt, chosen, rejected)


def _messages(value: object, field: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RowError("missing_field", f"{field} is {type(value).__name__}, expected a list of messages")
    return tuple(message for index, entry in enumerate(value) for message in _entry(entry, f"{field}[{index}]"))


def _entry(entry: object, where: str) -> tuple[Message, ...]:
    if not isinstance(entry, Mapping):
        raise RowError("missing_field", f"{where} is {type(entry).__name__}, expected a message")
    role, channel, thinking = entry.get("role"), entry.get("channel"), entry.get("thinking")
    if role not in ROLES:
        raise RowError("unknown_role", f"{where}: role {role!r} is none of {', '.join(ROLES)}")
    if entry.get("tool_calls"):
        raise RowError("tool_calls", f"{where} calls tools, which have no form here")
    content = entry.get("content")
    check_text(content, f"{where}.content")
    if role != "assistant":
        if channel is not None or thinking is not None:
            raise RowError("unknown_channel", f"{where}: a channel or thinking on a message of role {role!r}")
        return (Message(role, str(content)),)
    if channel is None:
        channel = "final"
    if channel not in CHANNELS:
        raise RowError("unknown_channel", f"{where}: channel {channel!r} is none of {', '.join(CHANNELS)}")
    message = Message(role, str(content), channel)
    if thinking is None:
        return (message,)
    check_text(thinking, f"{where}.thinking")
    return (Message("assistant", str(thinking), "analysis"), message)


def _prompt(value: object, field: str) -> tuple[Message, ...]:
    if not isinstance(value, str):
        return _messages(value, field)
    check_text(value, field)
    return (Message("user", value),)


def _completion(value: object, field: str) -> tuple[Message, ...]:
    if isinstance(value, Mapping):
        value = [value]
    if value is None or isinstance(value, str):
        check_text(value, field)
        return (Message("assistant", str(value), "final"),)
    messages = _messages(value, field)
    if not _COMPLETION.fullmatch(_spelled(messages)):
        raise RowError("role_order", f"{field} is {_names(messages)}; expected [analysis] final of the assistant")
    return messages


def _is_whole(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return False
    return isinstance(value[0], Mapping) and value[0].get("role") != "assistant"


def _split_last_turn(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    behind = users[-1] + 1 if users else len(messages)
    return messages[:behind], messages[behind:]


def _says(said: object, prompt: tuple[Message, ...]) -> bool:
    if isinstance(said, str):
        return bool(prompt) and prompt[-1].content == said
    return _messages(said, "prompt") == prompt


def _checked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not _CONVERSATION.fullmatch(_spelled(messages)):
        raise RowError("role_order", f"messages are {_names(messages)}; expected {_EXPECTED}")
    return messages


def _spelled(messages: Sequence[Message]) -> str:
    return "".join(_LETTERS[message.role, message.channel] for message in messages)


def _names(messages: Sequence[Message]) -> str:
    return " ".join(message.channel or message.role for message in messages) or "nothing"
