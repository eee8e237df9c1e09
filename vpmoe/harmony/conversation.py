"""A conversation as data, and what makes one fit for training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vpmoe.errors import RowError

ROLES = ("system", "developer", "user", "assistant")
CHANNELS = ("analysis", "final")

TRAINED = "[system] [developer] user analysis final"
CHAT = "[system] [developer], then turns of: user [analysis] final"
COMPLETION = "[analysis] final of the assistant"
_LETTERS = {
    ("system", None): "s",
    ("developer", None): "d",
    ("user", None): "u",
    ("assistant", "analysis"): "a",
    ("assistant", "final"): "f",
}
_FORMS = {TRAINED: re.compile("s?d?uaf"), CHAT: re.compile("s?d?(ua?f)+"), COMPLETION: re.compile("a?f")}


@dataclass(frozen=True, slots=True)
class Message:
    """One message: who speaks (``role``), what (``content``), and for the assistant on which ``channel``."""

    role: str
    content: str
    channel: str | None = None


def check_conversation(messages: Sequence[Message]) -> None:
    """Hold ``messages`` against the form that is trained on, :data:`TRAINED`, all with text.

    Raises:
        RowError: as :func:`check_order` and :func:`check_text`.
    """
    check_order(messages, TRAINED)
    for message in messages:
        text = message.content
        if isinstance(text, str) and text.isascii() and text and not text.isspace() and "\0" not in text:
            continue  # as nearly always: nothing for check_text to find
        check_text(text, f"{message.channel or message.role} message")


def check_order(messages: Sequence[Message], form: str, name: str = "messages") -> None:
    """Hold roles and channels against :data:`TRAINED`, :data:`CHAT` or :data:`COMPLETION`.

    Raises:
        RowError: with reason ``unknown_role``, ``unknown_channel`` or ``role_order``.
    """
    if _FORMS[form].fullmatch("".join(_LETTERS.get((message.role, message.channel), "?") for message in messages)):
        return
    for message in messages:
        if message.role not in ROLES:
            raise RowError("unknown_role", f"role {message.role!r} is none of {', '.join(ROLES)}")
        if (message.role, message.channel) not in _LETTERS:
            raise RowError("unknown_channel", f"channel {message.channel!r} on a message of role {message.role!r}")
    spelled = " ".join(message.channel or message.role for message in messages) or "nothing"
    raise RowError("role_order", f"{name} is {spelled}; expected {form}")


def check_text(text: object, field: str) -> None:
    """Refuse a field that is no text: absent, blank, bytes, with NUL, or with a lone surrogate (no UTF-8 form).

    Raises:
        RowError: with reason ``missing_field``, ``empty_field``, ``invalid_utf8`` or ``nul``, and an excerpt around the
            fault as its source.
    """
    if text is None:
        raise RowError("missing_field", f"{field} is missing")
    if isinstance(text, bytes):
        raise RowError("invalid_utf8", f"{field} is not UTF-8", source=ascii(text[:80]))
    if not isinstance(text, str):
        raise RowError("missing_field", f"{field} is {type(text).__name__}, expected text", source=excerpt(str(text)))
    if not text or text.isspace():
        raise RowError("empty_field", f"{field} is empty or blank", source=excerpt(text))
    if "\0" in text:
        place = text.index("\0")
        raise RowError("nul", f"{field} holds NUL at character {place}", source=excerpt(text, place))
    # An all-ASCII or well-formed text encodes; only lone surrogates do not.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"{field} holds a lone surrogate at character {error.start}"
            raise RowError("invalid_utf8", what, source=excerpt(text, error.start)) from error


def excerpt(text: str, place: int = 0) -> str:
    """At most 80 characters of ``text`` around ``place``, quoted, unprintable ones escaped."""
    return ascii(text[max(0, place - 40) : place + 40])
