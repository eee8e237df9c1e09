"""Small students for ``transformers``, of random weights, and the rows that their tests give them."""

from __future__ import annotations

from typing import Any

import torch

from vpmoe.hf.configuration_vpmoe import VpMoeConfig
from vpmoe.hf.modeling_vpmoe import VpMoeForCausalLM

VOCAB, WINDOW = 64, 4
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 8,
    "window_size": WINDOW,
    "window_attn_skip_freq": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "router_groups": 4,
    "router_group_topk": 2,
}
PLAIN = {"num_experts": None, "tpa": False, "value_residual": False, "softmax_type": "vanilla"}
KINDS = {
    "windows, GRAPE, sinks, experts": {},
    "global layers alone, distance bias, sinks": {"window_size": None, "num_experts": None},
    "windows and RoPE, no sinks": {**PLAIN, "local_position_embedding": "rope", "global_position_embedding": "rope"},
}
GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def model_of(kind: str = "windows, GRAPE, sinks, experts") -> VpMoeForCausalLM:
    """Random weights of a size that makes every part count."""
    torch.manual_seed(3)
    model = VpMoeForCausalLM(VpMoeConfig(**{**SMALL, **KINDS[kind]})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "weight" in name else 0.1))
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Rows of equal length; more tokens than the window, one token, and restarts inside a window.
ROWS = [[tokens(9, 1), tokens(1, 2), tokens(6, 3)], [tokens(2, 4), tokens(3, 5), tokens(11, 6)]]


def flat(rows: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and restarting positions of rows of documents."""
    ids = [[token for document in row for token in document] for row in rows]
    positions = [[at for document in row for at in range(len(document))] for row in rows]
    return torch.tensor(ids), torch.tensor(positions)


def alone(model: Any, document: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([document]), use_cache=False).logits[0]
