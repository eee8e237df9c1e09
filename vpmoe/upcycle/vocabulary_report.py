"""Texts under two vocabularies: how long they are, and how likely the two models find them, per byte.

Losses of models with different vocabularies compare per byte of text, not per token.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from vpmoe.weights import megatron_checkpoint
from vpmoe.weights.geometry import load_model, process_groups


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
    from megatron_vpmoe.model.attention.masks import left_padded

    cfg = megatron_checkpoint.read_config(checkpoint)
    found: list[tuple[int, float | None]] = []
    with process_groups(), torch.no_grad():
        model = load_model(
            cfg, megatron_checkpoint.read_weights(checkpoint), source=str(checkpoint), device=torch.device("cpu")
        )
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            scored = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
            if len(ids) < 2 or scored <= 0:
                found.append((len(ids), None))
                continue
            tokens, layout = left_padded([ids], model.device)
            logits = model(tokens, layout).logits()[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
            found.append((len(ids), round(float(loss) / math.log(2) / scored, 4)))
    return found
