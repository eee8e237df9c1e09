"""What ends an assistant's turn: the one list that training supervises, generation stops at and exports tell.

Harmony closes every message with ``<|end|>`` and the last one of a conversation with ``<|return|>``. The answer of an
earlier turn is history, read with ``<|end|>`` behind it; what is supervised in its place is ``<|return|>``, as
generation stops there and nowhere inside of a turn (``megatron_vpmoe.data.batch.Document.labels``).
"""

from __future__ import annotations

from collections.abc import Mapping

MESSAGE_END = "<|end|>"
TURN_END = "<|return|>"
"""Behind the answer, the message on the channel ``final``."""
GENERATION_ENDS = (TURN_END, "<|call|>", "<|im_end|>", "<|endoftext|>")
"""Special tokens that generation stops at: answer and tool call of Harmony, Qwen's turn, a document."""


def generation_ends(special_tokens: Mapping[str, int]) -> dict[str, int]:
    """Those of :data:`GENERATION_ENDS` that a vocabulary has, with their ids, in that order."""
    return {name: special_tokens[name] for name in GENERATION_ENDS if name in special_tokens}
