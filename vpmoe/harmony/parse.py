"""Token ids -> messages, strictly: what the renderer could not have written is refused, with the place and the reason.

Rendering then parsing gives the messages back. Parsing is used to verify datasets, and to judge what a model generated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vpmoe.errors import HarmonyError
from vpmoe.harmony.conversation import CHANNELS, ROLES, Message
from vpmoe.harmony.vocabulary import require_conversations
from vpmoe.tokenizer.interface import Tokenizer

NO_ANALYSIS = "no_analysis"
"""The reason of a completion that is sound but for being a final message alone."""


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """A message and where its ids lie: ``start`` of <|start|>, ``stop`` one behind the terminator."""

    message: Message
    start: int
    stop: int
    returns: bool


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a completion is valid Harmony, and its two texts as far as they could be read.

    Attributes:
        valid: an analysis message, then a final message closed with <|return|>, both with text, nothing else.
        reason: a short name of the first fault; None if valid.
        analysis: text of the analysis message, None if there is none.
        final: text of the final message, None if there is none.
    """

    valid: bool
    reason: str | None
    analysis: str | None
    final: str | None


@dataclass(frozen=True, slots=True)
class _Reading:
    """Ids to parse, and the places of the special ones among them, in order."""

    tokens: list[int]
    special: list[int]

    def next_special(self, position: int) -> int:
        """Place of the first special id from ``position`` on."""
        index = bisect_left(self.special, position)
        if index == len(self.special):
            raise _fault("unclosed", "the ids end inside a message", len(self.tokens))
        return self.special[index]


class Parser:
    """Strict parser for one vocabulary; ``opening`` is what every assistant's message begins with.

    Raises:
        TokenizerError: the vocabulary has no Harmony tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        require_conversations(tokenizer)
        self.tokenizer = tokenizer
        special = tokenizer.special_tokens
        self._start, self._channel, self._message = (special[f"<|{n}|>"] for n in ("start", "channel", "message"))
        self._end, self._return = special["<|end|>"], special["<|return|>"]
        self.opening = [self._start, *tokenizer.encode_ordinary("assistant").tolist()]
        self._role_of = {self._ids(role): role for role in ROLES}
        self._channel_of = {self._ids(channel): channel for channel in CHANNELS}

    def messages(self, ids: Iterable[int]) -> tuple[Message, ...]:
        """Messages of a rendered conversation (without document separator).

        Raises:
            HarmonyError: the ids are not what a renderer writes; names position and fault.
        """
        return tuple(parsed.message for parsed in self.parse(ids))

    def parse(self, ids: Iterable[int]) -> list[ParsedMessage]:
        """Messages with the places of their ids; as :meth:`messages` otherwise."""
        reading = self._reading(ids)
        parsed: list[ParsedMessage] = []
        position = 0
        while position < len(reading.tokens):
            parsed.append(self._one_message(reading, position))
            position = parsed[-1].stop
        for place, item in enumerate(parsed):
            ends_conversation = place == len(parsed) - 1 and item.message.channel == "final"
            if item.returns != ends_conversation:
                wrong = "<|return|> before the end" if item.returns else "a last final message without <|return|>"
                raise _fault("wrong_terminator", wrong, item.stop - 1)
        return parsed

    def judge_completion(self, ids: Iterable[int]) -> Judgement:
        """Judge what was generated behind a generation prompt (which ends in ``<|start|>assistant``).

        Args:
            ids: the generated ids up to and with the token that stopped the sampling.
        """
        texts: dict[str | None, str] = {}
        reading = self._reading([*self.opening, *ids])
        end = len(reading.tokens)
        position, order, reason = 0, [], None
        try:
            while position < end and reason is None:
                item = self._one_message(reading, position)
                position = item.stop
                order.append((item.message.role, item.message.channel, item.returns))
                texts.setdefault(item.message.channel, item.message.content)
                if item.returns and position < end:
                    reason = "text_after_return"
        except HarmonyError as error:
            reason = error.reason
        if reason is None:
            reason = _order_fault(order, texts)
        return Judgement(reason is None, reason, texts.get("analysis"), texts.get("final"))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode_ordinary(text).tolist())

    def _reading(self, ids: Iterable[int]) -> _Reading:
        tokens = [int(token) for token in ids]
        special = np.flatnonzero(np.asarray(tokens, dtype=np.int64) >= self.tokenizer.first_special_id)
        return _Reading(tokens, special.tolist())

    def _one_message(self, reading: _Reading, start: int) -> ParsedMessage:
        tokens = reading.tokens
        if tokens[start] != self._start:
            raise _fault("no_start", f"expected <|start|>, found id {tokens[start]}", start)
        opened = reading.next_special(start + 1)
        role = self._role_of.get(tuple(tokens[start + 1 : opened]))
        if role is None:
            raise _fault("unknown_role", f"role {self._shown(tokens[start + 1 : opened])}", start + 1)
        channel = None
        if tokens[opened] == self._channel:
            named = opened + 1
            opened = reading.next_special(named)
            channel = self._channel_of.get(tuple(tokens[named:opened]))
            if channel is None or role != "assistant":
                raise _fault("unknown_channel", f"channel {self._shown(tokens[named:opened])} of {role}", named)
        if tokens[opened] != self._message:
            raise _fault("no_message", f"expected <|message|>, found id {tokens[opened]}", opened)
        if channel is None and role == "assistant":
            raise _fault("no_channel", "an assistant message without a channel", opened)
        closed = reading.next_special(opened + 1)
        if tokens[closed] not in (self._end, self._return):
            raise _fault("special_in_content", f"special id {tokens[closed]} inside a content", closed)
        try:
            content = self.tokenizer.decode_bytes(tokens[opened + 1 : closed]).decode()
        except UnicodeDecodeError as error:
            raise _fault("invalid_utf8", f"content is not UTF-8: {error.reason}", opened + 1) from error
        return ParsedMessage(Message(role, content, channel), start, closed + 1, tokens[closed] == self._return)

    def _shown(self, tokens: list[int]) -> str:
        return repr(self.tokenizer.decode(tokens))


def spans_of(parsed: Sequence[ParsedMessage], length: int) -> np.ndarray:
    """Span of every id by the parser's reading, uint8 ``[length]``; owes nothing to the renderer's account of spans."""
    spans = np.zeros(length, dtype=np.uint8)
    for item in parsed:
        if item.message.role == "assistant":
            spans[item.start : item.stop] = 1 + CHANNELS.index(item.message.channel or "")
    return spans


def _order_fault(order: list[tuple[str, str | None, bool]], texts: dict[str | None, str]) -> str | None:
    expected = [("assistant", "analysis", False), ("assistant", "final", True)]
    if order == expected:
        return next((f"empty_{name}" for name in CHANNELS if not texts[name].strip()), None)
    if [entry[:2] for entry in order] == [entry[:2] for entry in expected]:
        return "wrong_terminator"
    return NO_ANALYSIS if order == expected[1:] and texts["final"].strip() else "wrong_order"


def _fault(reason: str, what: str, position: int) -> HarmonyError:
    return HarmonyError(
        f"not valid Harmony: {what}",
        source=f"token {position}",
        remedy="compare with vpmoe data inspect",
        reason=reason,
    )
