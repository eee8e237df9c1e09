"""What a vocabulary needs for conversations: the special tokens that messages are made of."""

from __future__ import annotations

from megatron_vpmoe.turns import MESSAGE_END, TURN_END
from vpmoe.errors import TokenizerError
from vpmoe.tokenizer.interface import Tokenizer

MESSAGE_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", MESSAGE_END, TURN_END)


def knows_conversations(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has Harmony's tokens."""
    return all(name in tokenizer.special_tokens for name in MESSAGE_TOKENS)


def require_conversations(tokenizer: Tokenizer) -> None:
    """Refuse a vocabulary without Harmony's tokens; raises :class:`TokenizerError`."""
    if not knows_conversations(tokenizer):
        missing = [name for name in MESSAGE_TOKENS if name not in tokenizer.special_tokens]
        raise TokenizerError(
            f"the vocabulary has no Harmony tokens ({', '.join(missing)}), so it holds plain text only",
            source=tokenizer.source,
            remedy="use o200k Harmony or a compact vocabulary of it, or learn one that has them: "
            "vpmoe tokenizer train --special-tokens harmony",
        )
