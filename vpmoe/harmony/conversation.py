"""A conversation as data, and what makes one fit for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vpmoe.errors import RowError

ROLES = ("system", "developer", "user", "assistant")
CHANNELS = ("analysis", "final")

# The one order that a training conversation has; system and developer may be left out.
_FULL_ORDER = (("system", None), ("developer", None), ("user", None), ("assistant", "analysis"), ("assistant", "final"))
_ORDERS = frozenset(head + _FULL_ORDER[2:] for head in ((), _FULL_ORDER[:1], _FULL_ORDER[1:2], _FULL_ORDER[:2]))


@dataclass(frozen=True, slots=True)
class Message:
    """One message: who speaks (``role``), what (``content``), and for the assistant on which ``channel``."""

    role: str
    content: str
    channel: str | None = None


def check_conversation(messages: Sequence[Message]) -> None:
    """Hold ``messages`` against the form that is trained on: [system] [developer] user analysis final, all with text.

    Raises:
        RowError: with reason ``unknown_role``, ``unknown_channel``, ``role_order``, ``missing_field``, ``empty_field``,
            ``invalid_utf8`` or ``nul``.
    """
    order = tuple((message.role, message.channel) for message in messages)
    if order not in _ORDERS:
        _refuse_order(order)
    for message in messages:
        text = message.content
        if isinstance(text, str) and text.isascii() and text and not text.isspace() and "\0" not in text:
            continue  # as nearly always: nothing for check_text to find
        check_text(text, f"{message.channel or message.role} message")


def check_text(text: object, field: str) -> None:
    """Refuse a field that is no text: absent, blank, bytes, with NUL, or with a lone surrogate (no UTF-8 form).

    Raises:
        RowError: with an excerpt of the text around the fault as its source.
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


def _refuse_order(order: Sequence[tuple[str, str | None]]) -> None:
    for role, channel in order:
        if role not in ROLES:
            raise RowError("unknown_role", f"role {role!r} is none of {', '.join(ROLES)}")
        if channel is not None and (channel not in CHANNELS or role != "assistant"):
            raise RowError("unknown_channel", f"channel {channel!r} on a message of role {role!r}")
        if channel is None and role == "assistant":
            raise RowError("unknown_channel", "an assistant message without a channel")
    spelled = " ".join(channel or role for role, channel in order) or "nothing"
    raise RowError("role_order", f"messages are {spelled}; expected [system] [developer] user analysis final")
