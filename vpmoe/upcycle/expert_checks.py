"""Which experts the tokens of a model reach, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from vpmoe.weights import Weights
from vpmoe.weights.geometry import process_groups
from vpmoe.weights.streamed_model import streamed_model
from vpmoe.weights.tensors import random_prompts

_ROW = 128


def experts_reached(
    cfg: RunConfig, weights: Weights, tokens: int, vocab_size: int, seed: int, *, source: str
) -> dict[str, Any]:
    """Count the experts that at least one of ``tokens`` random tokens is sent to, in every MoE layer.

    Returns:
        JSON-able: experts in all, the smallest and mean number reached over layers, and every layer's (from 1).
    """
    from megatron_vpmoe.model.attention.masks import left_padded

    lengths = [_ROW] * (tokens // _ROW) + ([tokens % _ROW] if tokens % _ROW else [])
    prompts = random_prompts(vocab_size, lengths, seed)
    chosen: dict[int, list[Tensor]] = {}
    with process_groups(), torch.no_grad():
        model = streamed_model(cfg, weights, source=source)
        tokens_BS, layout = left_padded(prompts, torch.device("cpu"))
        real_N = (layout.document_id >= 0).t().reshape(-1)
        layers: Any = model.decoder.layers
        for number, layer in enumerate(layers, 1):
            if cfg.is_moe_layer(number):
                layer.mlp.router.recorded = chosen[number] = []
        model(tokens_BS, layout)
    reached = {number: len(of_pass[real_N].unique()) for number, (of_pass,) in chosen.items()}
    return {
        "tokens": tokens,
        "experts": cfg.moe.num_experts,
        "smallest": min(reached.values()),
        "mean": sum(reached.values()) / len(reached),
        "by_layer": reached,
    }
