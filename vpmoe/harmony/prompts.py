"""The system and developer messages of a dataset: options that go into the manifest, and their Harmony text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from vpmoe.errors import HarmonyError
from vpmoe.harmony.conversation import CHANNELS, Message

DEFAULT_IDENTITY = "You are vpMoE, a small reasoning model."
DEFAULT_KNOWLEDGE_CUTOFF = "2024-06"
# A fixed date: the day of the conversion would make two conversions of the same rows differ.
DEFAULT_START_DATE = "2025-01-01"
DEFAULT_INSTRUCTIONS = "Reason in the analysis channel, then answer in the final channel."
ReasoningEffort = Literal["low", "medium", "high"]
REASONING_EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class Prompts:
    """What stands before the user's message in every conversation of a dataset.

    Attributes:
        model_identity: first line of the system message; None or empty leaves it out.
        knowledge_cutoff: ``YYYY-MM``; None or empty leaves the line out.
        conversation_start_date: ``YYYY-MM-DD``; None or empty leaves the line out.
        reasoning_effort: ``low``, ``medium`` or ``high``.
        valid_channels: channels the system message names; none leaves the line out.
        developer_instructions: text of the developer message; None or empty leaves the message out.
    """

    model_identity: str | None = DEFAULT_IDENTITY
    knowledge_cutoff: str | None = DEFAULT_KNOWLEDGE_CUTOFF
    conversation_start_date: str | None = DEFAULT_START_DATE
    reasoning_effort: ReasoningEffort = "medium"
    valid_channels: tuple[str, ...] = CHANNELS
    developer_instructions: str | None = DEFAULT_INSTRUCTIONS

    def system_text(self) -> str:
        """Content of the system message, as openai_harmony writes a SystemContent with the same fields."""
        head = [self.model_identity] if self.model_identity else []
        if self.knowledge_cutoff:
            head.append(f"Knowledge cutoff: {self.knowledge_cutoff}")
        if self.conversation_start_date:
            head.append(f"Current date: {self.conversation_start_date}")
        sections = ["\n".join(head)] if head else []
        sections.append(f"Reasoning: {self.reasoning_effort}")
        if self.valid_channels:
            names = ", ".join(self.valid_channels)
            sections.append(f"# Valid channels: {names}. Channel must be included for every message.")
        return "\n\n".join(sections)

    def messages(self) -> tuple[Message, ...]:
        """The system message and, with instructions, the developer message."""
        system = Message("system", self.system_text())
        if not self.developer_instructions:
            return (system,)
        return (system, Message("developer", f"# Instructions\n\n{self.developer_instructions}"))

    def as_manifest(self) -> dict[str, Any]:
        """The options and the texts made of them, for a manifest."""
        texts = {message.role: message.content for message in self.messages()}
        return {
            "options": asdict(self) | {"valid_channels": list(self.valid_channels)},
            "system": texts["system"],
            "developer": texts.get("developer"),
        }


_EFFORT = re.compile(f"^Reasoning: ({'|'.join(REASONING_EFFORTS)})$", re.MULTILINE)


def names_effort(system: str) -> bool:
    """Whether a system message has a line ``Reasoning: low``, medium or high."""
    return bool(_EFFORT.search(system))


def with_reasoning_effort(messages: Sequence[Message], effort: str) -> tuple[Message, ...]:
    """The messages, with another effort in the line ``Reasoning: EFFORT`` of the system message.

    Raises:
        HarmonyError: there is no such line.
    """
    asking = [message.role == "system" and names_effort(message.content) for message in messages]
    if not any(asking):
        raise HarmonyError(
            "no system message with a line 'Reasoning: low', medium or high, so there is no effort to change",
            source=f"reasoning effort {effort}",
            remedy="leave out --reasoning, or give such a message with --system",
        )
    return tuple(
        replace(message, content=_EFFORT.sub(f"Reasoning: {effort}", message.content)) if asks else message
        for message, asks in zip(messages, asking, strict=True)
    )
