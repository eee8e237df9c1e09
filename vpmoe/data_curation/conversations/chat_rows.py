"""Chat rows -> messages: ``messages``, ``prompt`` + ``completion``, and ``chosen`` against ``rejected``.

A message is ``{"role", "content"}`` with role system, developer, user or assistant, and for the assistant optionally
``channel`` (analysis or final; final where it is absent) and reasoning, which becomes an analysis message before it:
``thinking``, ``reasoning_content``, ``reasoning``, or a ``<think>`` block that the content begins with. Nothing else of
a row is left out without a word: a key that is neither understood nor bookkeeping rejects it by its name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from vpmoe.errors import RowError
from vpmoe.harmony.conversation import CHANNELS, CHAT, COMPLETION, ROLES, Message, check_order, check_text, excerpt

_REASONING = ("thinking", "reasoning_content", "reasoning")
_OF_MESSAGES = ("role", "content")
_OF_PAIRS = ("messages", "prompt", "chosen", "rejected")
KEYS = frozenset((*_OF_MESSAGES, "channel", *_REASONING, *_OF_PAIRS, "completion"))
"""What is understood of rows and messages."""
_BOOKKEEPING = re.compile(
    "id|uuid|idx|index|hash|timestamp|date|created|updated|source|dataset|split|license|language|lang|url|model|"
    "metadata|(?!tool_call).*_(id|at|hash)"
)
_NOTHING = (None, "", [], {})
_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


class Pair(NamedTuple):
    """A prompt and two ways to go on: each ``[analysis] final``."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


def without_keys(value: Any, ignored: Collection[str]) -> Any:
    """A row without the keys that are to be ignored, those of its messages included."""
    if isinstance(value, Mapping):
        return {key: without_keys(inner, ignored) for key, inner in value.items() if key not in ignored}
    return [without_keys(inner, ignored) for inner in value] if isinstance(value, list) else value


def chat_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The conversation of a row with ``messages``, or with ``prompt`` and ``completion``.

    Raises:
        RowError: a field is missing, not usable or not understood, or the messages are in no order that is trained on.
    """
    is_list = row.get("messages") is not None
    _check_keys(row, ("messages", "prompt") if is_list else ("prompt", "completion"), "")
    if is_list:
        messages = _messages(row["messages"], "messages")
        _check_said(row, ("prompt",), messages)
    elif row.get("prompt") is not None:
        messages = _prompt(row["prompt"], "prompt") + _completion(row.get("completion"), "completion")
    else:
        raise RowError("missing_field", "neither messages nor prompt is there")
    check_order(messages, CHAT)
    return messages


def preference_pair(row: Mapping[str, Any]) -> Pair:
    """The pair of a row with ``prompt`` or ``messages``, ``chosen`` and ``rejected``.

    Where ``chosen`` and ``rejected`` are whole conversations, they have to agree up to their last user message, which
    ends the prompt. What else says the prompt (``prompt``, ``messages``) has to be a user's text in it, or the first
    messages of prompt and chosen.

    Raises:
        RowError: as :func:`chat_messages`; ``different_prompts``; ``equal_pair``: there is nothing to prefer.
    """
    _check_keys(row, _OF_PAIRS, "")
    whole = {side: _messages(row[side], side) for side in ("chosen", "rejected") if _is_whole(row.get(side))}
    if len(whole) == 1:
        raise RowError("different_prompts", f"only {next(iter(whole))} is a whole conversation")
    if whole:
        (prompt, chosen), (other, rejected) = map(_split_last_turn, whole.values())
        if prompt != other:
            raise RowError("different_prompts", "chosen and rejected do not begin with the same messages")
    else:
        field = "prompt" if row.get("prompt") is not None else "messages"
        prompt = _prompt(row.get(field), field)
        chosen, rejected = (_completion(row.get(side), side) for side in ("chosen", "rejected"))
    for side in (chosen, rejected):
        check_order(prompt + side, CHAT)
    _check_said(row, ("prompt", "messages"), prompt + chosen)
    if chosen == rejected:
        raise RowError("equal_pair", "chosen and rejected are the same")
    return Pair(prompt, chosen, rejected)


def _check_keys(entry: Mapping[str, Any], understood: Sequence[str], where: str) -> None:
    for key, value in entry.items():
        if key in understood or value in _NOTHING or _BOOKKEEPING.fullmatch(key):
            continue
        # The name is a part of the reason: reasons are what is counted and shown.
        what = f"{where}{key[:40]} is not understood; --ignore-fields leaves a key unread"
        raise RowError(f"unknown_key:{key[:40]}", what, source=excerpt(str(value)))


def _messages(value: object, field: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RowError("missing_field", f"{field} is {type(value).__name__}, expected a list of messages")
    return tuple(message for index, entry in enumerate(value) for message in _entry(entry, f"{field}[{index}]"))


def _entry(entry: object, where: str) -> tuple[Message, ...]:
    if not isinstance(entry, Mapping):
        raise RowError("missing_field", f"{where} is {type(entry).__name__}, expected a message")
    role, channel, content = entry.get("role"), entry.get("channel"), entry.get("content")
    if role not in ROLES:
        raise RowError("unknown_role", f"{where}: role {role!r} is none of {', '.join(ROLES)}")
    assistant = role == "assistant"
    _check_keys(entry, (*_OF_MESSAGES, "channel", *_REASONING) if assistant else _OF_MESSAGES, f"{where}.")
    if isinstance(content, list):
        kinds = sorted({str(part.get("type")) if isinstance(part, Mapping) else "?" for part in content})
        raise RowError("content_parts", f"{where}.content is parts of type {', '.join(kinds)}, expected text")
    check_text(content, f"{where}.content")
    if not assistant:
        return (Message(role, str(content)),)
    if channel is None:
        channel = "final"
    if channel not in CHANNELS:
        raise RowError("unknown_channel", f"{where}: channel {channel!r} is none of {', '.join(CHANNELS)}")
    thoughts = {key: entry[key] for key in _REASONING if entry.get(key) is not None}
    thoughts["<think>"], answer = _split_think(str(content), where)
    check_text(answer, f"{where}.content")
    return (*_analysis(thoughts, where), Message(role, answer, channel))


def _split_think(content: str, where: str) -> tuple[str, str]:
    """The block that the content begins with, empty if there is none, and the rest."""
    if "think>" not in content:
        return "", content
    block = _THINK.match(content)
    thought, answer = (block[1].strip("\n"), content[block.end() :].lstrip("\n")) if block else ("", content)
    if any(tag in thought + answer for tag in ("<think>", "</think>")):
        raise RowError("think_tag", f"{where}.content has a <think> tag that is no one block before the answer")
    return thought, answer


def _analysis(thoughts: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The message of the reasoning; none where it is blank, as templates write it for models that do not think."""
    found: dict[str, str] = {}
    for key, thought in thoughts.items():
        if isinstance(thought, str) and (not thought or thought.isspace()):
            continue
        check_text(thought, f"{where}.{key}")
        found.setdefault(thought.strip(), thought)
    if len(found) > 1:
        told = ", ".join(key for key, thought in thoughts.items() if thought.strip())
        raise RowError("two_reasonings", f"{where} has reasonings that differ, in {told}")
    return tuple(Message("assistant", thought, "analysis") for thought in found.values())


def _prompt(value: object, field: str) -> tuple[Message, ...]:
    if not isinstance(value, str):
        return _messages(value, field)
    check_text(value, field)
    return (Message("user", value),)


def _completion(value: object, field: str) -> tuple[Message, ...]:
    if value is None or isinstance(value, str):
        value = {"role": "assistant", "content": value}
    messages = _messages([value] if isinstance(value, Mapping) else value, field)
    check_order(messages, COMPLETION, field)
    return messages


def _is_whole(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return False
    return isinstance(value[0], Mapping) and value[0].get("role") != "assistant"


def _split_last_turn(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    behind = users[-1] + 1 if users else len(messages)
    return messages[:behind], messages[behind:]


def _check_said(row: Mapping[str, Any], fields: Sequence[str], messages: tuple[Message, ...]) -> None:
    """What a row says beside its messages has to be said in them: a user's text, or how they begin."""
    for field in fields:
        said = row.get(field)
        if isinstance(said, str):
            agrees = not said or Message("user", said) in messages
        else:
            begun = () if said in _NOTHING else _messages(said, field)
            agrees = messages[: len(begun)] == begun
        if not agrees:
            raise RowError("different_prompts", f"{field} is not what the messages say")
