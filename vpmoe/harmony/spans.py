"""Which tokens are supervised, and as what: the span of a token, the loss mask, and their alignment to labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vpmoe.errors import HarmonyError
from vpmoe.harmony.renderer import RenderedConversation
from vpmoe.tokenizer.interface import TokenArray

CONTEXT, ANALYSIS, FINAL = 0, 1, 2
SPAN_NAMES = ("context", "analysis", "final")

SpanArray = NDArray[np.uint8]


def span_of_message(role: str, channel: str | None) -> int:
    """Span of a whole message, wrapper tokens included; everything but the assistant's is context.

    Raises:
        HarmonyError: an assistant message on a channel that has no span.
    """
    if role != "assistant":
        return CONTEXT
    if channel == "analysis":
        return ANALYSIS
    if channel == "final":
        return FINAL
    raise HarmonyError(
        f"an assistant message on channel {channel!r} has no span",
        source="message channel",
        remedy="use the channels analysis and final",
    )


def documents(
    conversations: Sequence[RenderedConversation], eod_id: int
) -> tuple[TokenArray, SpanArray, NDArray[np.int64]]:
    """Conversations as they are stored, one behind the other, each with <|endoftext|> behind it.

    Returns:
        ``(tokens, span, lengths)``: int32 and uint8 ``[sum of lengths]``, int64 ``[len(conversations)]``; a length is
        ``len(conversation) + 1``, the separator is context.
    """
    separator = np.array([eod_id], dtype=np.int32)
    parts: list[TokenArray] = []
    spans: list[int] = []
    repeats: list[int] = []
    lengths: list[int] = []
    for conversation in conversations:
        length = 1
        for message in conversation.messages:
            parts += (message.header, message.content, message.terminator)
            spans.append(span_of_message(message.role, message.channel))
            repeats.append(len(message))
            length += repeats[-1]
        parts.append(separator)
        spans.append(CONTEXT)
        repeats.append(1)
        lengths.append(length)
    tokens = np.concatenate(parts) if parts else separator[:0]
    return tokens, np.repeat(np.array(spans, dtype=np.uint8), repeats), np.array(lengths, dtype=np.int64)


def aligned_to_labels(per_token: SpanArray, lengths: NDArray[np.int64]) -> SpanArray:
    """Shift a per-token signal to where it is used: entry t describes token t+1, a document's last entry is 0.

    Args:
        per_token: ``[sum of lengths]``, documents one behind the other.
        lengths: ``[documents]``, each at least 1.
    """
    aligned = np.zeros_like(per_token)
    aligned[:-1] = per_token[1:]
    aligned[np.cumsum(lengths) - 1] = CONTEXT
    return aligned


def loss_mask(span: SpanArray) -> SpanArray:
    """1 where a token is supervised, that is where its span is analysis or final."""
    return (span != CONTEXT).astype(np.uint8)
