"""The same rendering done by the package openai_harmony: the tests' oracle, and the choice ``--renderer official``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import openai_harmony

from vpmoe.harmony.conversation import Message
from vpmoe.harmony.renderer import (
    RenderedConversation,
    RenderedMessage,
    check_prompt,
    installed_harmony_version,
)
from vpmoe.tokenizer import rank_file
from vpmoe.tokenizer.interface import TokenArray, Tokenizer
from vpmoe.tokenizer.o200k_harmony import NAMED_SPECIAL_TOKENS

_KEEP_ANALYSIS = openai_harmony.RenderConversationConfig(auto_drop_analysis=False)


@lru_cache(maxsize=1)
def load_encoding(configured: Path | None = None) -> openai_harmony.HarmonyEncoding:
    """openai_harmony's encoding, read offline from the checked rank file.

    Raises:
        TokenizerError: no trustworthy rank file.
    """
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(rank_file.plain_directory(configured))
    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


class OfficialRenderer:
    """openai_harmony behind :class:`vpmoe.harmony.renderer.Renderer`; several times slower than the fast renderer."""

    name = "official"

    def __init__(self, tokenizer: Tokenizer, rank_file_path: Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.version = f"openai-harmony {installed_harmony_version()}"
        self._encoding = load_encoding(rank_file_path)

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        """Token pieces of a whole conversation, cut out of what openai_harmony rendered."""
        ids = self._encoding.render_conversation_for_training(as_official(messages), _KEEP_ANALYSIS)
        return RenderedConversation(tuple(self._pieces(np.asarray(ids, dtype=np.int32), messages)))

    def generation_prompt(self, messages: Sequence[Message]) -> TokenArray:
        """Ids to sample after, int32; raises :class:`HarmonyError` unless the last message is the user's."""
        check_prompt(messages)
        ids = self._encoding.render_conversation_for_completion(
            as_official(messages), openai_harmony.Role.ASSISTANT, _KEEP_ANALYSIS
        )
        return self.tokenizer.from_o200k(ids)

    def _pieces(self, ids: TokenArray, messages: Sequence[Message]) -> list[RenderedMessage]:
        # Contents hold ordinary ids only, so the special ids alone tell where a message and its content begin and end.
        starts = np.flatnonzero(ids == NAMED_SPECIAL_TOKENS["<|start|>"])
        opens = np.flatnonzero(ids == NAMED_SPECIAL_TOKENS["<|message|>"]) + 1
        ends = np.append(starts[1:], len(ids))
        convert = self.tokenizer.from_o200k
        return [
            RenderedMessage(
                message.role,
                message.channel,
                convert(ids[start:opened]),
                convert(ids[opened : end - 1]),
                convert(ids[end - 1 : end]),
            )
            for message, start, opened, end in zip(messages, starts, opens, ends, strict=True)
        ]


def as_official(messages: Sequence[Message]) -> openai_harmony.Conversation:
    """The conversation in openai_harmony's own types; system and developer contents go in as the text they are."""
    converted: list[openai_harmony.Message] = []
    for message in messages:
        official = openai_harmony.Message.from_role_and_content(openai_harmony.Role(message.role), message.content)
        converted.append(official.with_channel(message.channel) if message.channel is not None else official)
    return openai_harmony.Conversation.from_messages(converted)
