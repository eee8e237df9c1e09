"""Texts under two vocabularies: how long they are, and how likely the two models find them, per byte.

Losses of models with different vocabularies compare per byte of text, not per token.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vpmoe.upcycle.rung_below import text_losses
from vpmoe.weights import megatron_checkpoint


def measure(checkpoints: tuple[Path, Path], tokenizers: tuple[Any, Any], texts: list[str]) -> list[dict[str, Any]]:
    """Tokens and bits per byte of each text, before and after.

    The first token is not scored (nothing stands before it), on either side. Computed on the CPU, as conversions are.

    Args:
        checkpoints: the model before and after.
        tokenizers: theirs.
    """
    sides = [_bits(path, tokenizer, texts) for path, tokenizer in zip(checkpoints, tokenizers, strict=True)]
    return [
        {
            "text": text if len(text) <= 80 else f"{text[:77]}...",
            "bytes": len(text.encode()),
            "tokens": {"before": before[0], "after": after[0]},
            "bits_per_byte": {"before": before[1], "after": after[1]},
        }
        for text, before, after in zip(texts, *sides, strict=True)
    ]


def _bits(checkpoint: Path, tokenizer: Any, texts: list[str]) -> list[tuple[int, float | None]]:
    ids = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    scored = [
        len(text.encode()) - len(tokenizer.decode(tokens[:1]).encode()) if len(tokens) > 1 else 0
        for text, tokens in zip(texts, ids, strict=True)
    ]
    cfg, weights = megatron_checkpoint.read_config(checkpoint), megatron_checkpoint.read_weights(checkpoint)
    asked = [tokens for tokens, count in zip(ids, scored, strict=True) if count > 0]
    losses = iter(text_losses(cfg, weights, asked, source=str(checkpoint)))
    return [
        (len(tokens), round(float(next(losses).sum()) / math.log(2) / count, 4) if count > 0 else None)
        for tokens, count in zip(ids, scored, strict=True)
    ]
