"""A vocabulary of its own: a BPE learned from a few sentences, with Harmony's tokens."""

from __future__ import annotations

from pathlib import Path

from vpmoe.tokenizer.bpe import SpecialTokens, save_bpe, train_bpe

SENTENCES = [
    "Once upon a time a little fox named Mia lived near the river.",
    "The user asked the assistant: what did Mia find? An analysis, then a final answer.",
    "Mia wanted to find her red ball, but the wind was strong. Tom the bear said: 12 steps!",
] * 20


def write_vocabulary(folder: Path, vocab_size: int = 320, special_tokens: SpecialTokens = "harmony") -> Path:
    """An HF directory with ``tokenizer.json``; returns it."""
    save_bpe(train_bpe(SENTENCES, vocab_size, special_tokens), folder)
    return folder
