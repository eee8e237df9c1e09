"""Conversation -> token pieces, message by message; equal to openai_harmony's training rendering, id for id.

A message is ``<|start|> role [<|channel|> channel] <|message|> content <|end|>``; a last message on the channel
``final`` ends in ``<|return|>`` (``megatron_vpmoe.turns`` has more on it). Contents are encoded as ordinary text, so no
text can spell its way into structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_vpmoe.turns import MESSAGE_END, TURN_END
from vpmoe.errors import HarmonyError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.vocabulary import require_conversations
from vpmoe.tokenizer.interface import TokenArray, Tokenizer

RENDERERS = ("fast", "official")


@dataclass(frozen=True, slots=True)
class RenderedMessage:
    """Token ids of one message: ``header`` up to and with <|message|>, ``content``, one-token ``terminator``."""

    role: str
    channel: str | None
    header: TokenArray
    content: TokenArray
    terminator: TokenArray

    def __len__(self) -> int:
        return len(self.header) + len(self.content) + len(self.terminator)


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """Token ids of a conversation, still in the pieces that truncation cuts and spans label."""

    messages: tuple[RenderedMessage, ...]

    def __len__(self) -> int:
        return sum(map(len, self.messages))

    def tokens(self) -> TokenArray:
        """All ids in order, int32 ``[len(self)]``, without a document separator."""
        return np.concatenate([part for m in self.messages for part in (m.header, m.content, m.terminator)])


class Renderer(Protocol):
    """What the builder and the sampler need of a renderer."""

    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """``fast`` or ``official``."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the ids could."""
        ...

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        """Token pieces of a whole conversation."""
        ...

    def generation_prompt(self, messages: Sequence[Message]) -> TokenArray:
        """Ids to sample after: the messages and ``<|start|>assistant``; the last message has to be the user's."""
        ...


class FastRenderer:
    """Headers and constant messages are encoded once; only a row's own text goes through the tokenizer.

    Raises:
        TokenizerError: the vocabulary has no Harmony tokens.
    """

    name = "fast"
    version = "1"

    def __init__(self, tokenizer: Tokenizer) -> None:
        require_conversations(tokenizer)
        self.tokenizer = tokenizer
        self._end = _one(tokenizer, MESSAGE_END)
        self._return = _one(tokenizer, TURN_END)
        self._header = lru_cache(maxsize=None)(self._encode_header)
        # System and developer messages are few and repeat over the whole dataset.
        self._constant = lru_cache(maxsize=64)(self._encode_constant)

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        """Token pieces of a whole conversation; a last ``final`` message ends in <|return|>.

        Raises:
            TokenizerError: a content has no UTF-8 form or cannot be split.
        """
        last = len(messages) - 1
        rendered: list[RenderedMessage] = []
        for position, message in enumerate(messages):
            if message.role in ("system", "developer"):
                rendered.append(self._constant(message))
                continue
            returns = position == last and message.role == "assistant" and message.channel == "final"
            content = self.tokenizer.encode_ordinary(message.content)
            header = self._header(message.role, message.channel)
            terminator = self._return if returns else self._end
            rendered.append(RenderedMessage(message.role, message.channel, header, content, terminator))
        return RenderedConversation(tuple(rendered))

    def generation_prompt(self, messages: Sequence[Message]) -> TokenArray:
        """Ids to sample after: ``messages`` and then ``<|start|>assistant``, int32.

        Raises:
            HarmonyError: the last message is not the user's.
        """
        check_prompt(messages)
        return np.concatenate([self.render(messages).tokens(), self._assistant_opening])

    @cached_property
    def _assistant_opening(self) -> TokenArray:
        return np.concatenate([_one(self.tokenizer, "<|start|>"), self.tokenizer.encode_ordinary("assistant")])

    def _encode_header(self, role: str, channel: str | None) -> TokenArray:
        parts = [_one(self.tokenizer, "<|start|>"), self.tokenizer.encode_ordinary(role)]
        if channel is not None:
            parts += [_one(self.tokenizer, "<|channel|>"), self.tokenizer.encode_ordinary(channel)]
        return np.concatenate([*parts, _one(self.tokenizer, "<|message|>")])

    def _encode_constant(self, message: Message) -> RenderedMessage:
        header = self._header(message.role, message.channel)
        content = self.tokenizer.encode_ordinary(message.content)
        return RenderedMessage(message.role, message.channel, header, content, self._end)


def make_renderer(name: str, tokenizer: Tokenizer, rank_file_path: Path | None = None) -> Renderer:
    """The renderer called ``name``: ``fast``, or ``official`` on top of the package openai_harmony.

    Args:
        name: one of :data:`RENDERERS`.
        tokenizer: vocabulary of the ids to write.
        rank_file_path: for ``official``, which loads the ranks itself: where they are, if not in the usual places.

    Raises:
        HarmonyError: another name.
        TokenizerError: the vocabulary has no Harmony tokens.
    """
    if name == "fast":
        return FastRenderer(tokenizer)
    if name == "official":
        # Imported here: it loads a second copy of the vocabulary.
        from vpmoe.harmony.official import OfficialRenderer

        return OfficialRenderer(tokenizer, rank_file_path)
    raise HarmonyError(f"unknown renderer {name!r}", source="--renderer", remedy=f"use one of {', '.join(RENDERERS)}")


def check_prompt(messages: Sequence[Message]) -> None:
    """Refuse a prompt that does not end with the user's message."""
    if not messages or messages[-1].role != "user":
        last = messages[-1].role if messages else "nothing"
        raise HarmonyError(
            f"a prompt ends with the user's message, this one with {last}",
            source="generation prompt",
            remedy="pass the conversation up to and with the user's message",
        )


def installed_harmony_version() -> str:
    """Version of the installed package openai_harmony."""
    return package_version("openai-harmony")


def _one(tokenizer: Tokenizer, spelling: str) -> TokenArray:
    return np.array([tokenizer.special_id(spelling)], dtype=np.int32)
