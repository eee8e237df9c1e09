"""A vpMoE small enough for a unit test, with every part of the design in it, and batches to feed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.data.batch import Batch

ROOT = Path(__file__).resolve().parent.parent

TINY = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "padded_vocab_size": 64,
    "window_size": 8,
    "num_experts": 8,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 48,
    "moe_router_topk": 2,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "seq_length": 48,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": 20,
    "lr_warmup_iters": 2,
    "nproc_per_node": 1,
    "sample_max_new_tokens": 8,
    "wandb_mode": "disabled",
    "router_max_load_warn_pct": None,
    "router_dead_experts_warn": None,
}

NANO_MOE: dict[str, Any] = {
    "file": "../nano_moe/nano_moe.yaml",
    **dict.fromkeys(("window_size", "moe_router_num_groups", "moe_router_group_topk")),
}
"""For ``tiny_config``: softmax routing without groups and bias, grouped-query attention with RoPE and nothing else."""

MIXTURE: dict[str, Any] = {
    "file": "../think/mixture.yaml",
    **dict.fromkeys(
        ("num_experts", "window_size", "moe_router_num_groups", "moe_router_group_topk", "load_experts"), None
    ),
    **{"num_query_groups": 4, "bf16": False},
    **{"ssm_inner_size": 24, "ssm_state_size": 4, "ssm_step_rank": 3, "diffusion_levels": 20, "ddim_steps": 2},
    **{"kv_lora_rank": 12, "qk_pos_emb_head_dim": 4},
    "mixture_experts": [{"layer_type": kind, "num_layers": 2} for kind in ("transformer", "state_space", "denoiser")],
}
"""For ``tiny_config``: two layers each of the three kinds of experts, with weights of their own."""


def tiny_config(*, file: str = "stage1.yaml", **changes: object) -> RunConfig:
    """A file of configs/nano at test size; keywords override fields."""
    flags: list[str] = []
    for name, value in {**TINY, **changes}.items():
        flags += [f"--{name.replace('_', '-')}", flag_text(value)]
    return load_config(ROOT / "configs" / "nano" / file, flags)


def flag_text(value: object) -> str:
    """A field's value as the command line spells it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def random_batch(rows: int, seq_length: int, vocab: int, seed: int) -> Batch:
    """Rows of three conversations and some padding, with spans of unequal size; a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab, (rows, seq_length), generator=generator)
    cuts = torch.sort(torch.randint(2, seq_length - 1, (rows, 3), generator=generator)).values
    column = torch.arange(seq_length)
    document = (column[None, None, :] >= cuts[:, :2, None]).sum(1).to(torch.int32)
    document[column[None, :] >= cuts[:, 2:]] = -1
    starts = torch.cat([torch.ones(rows, 1, dtype=torch.bool), document[:, 1:] != document[:, :-1]], dim=1)
    first = torch.where(starts, column, 0).cummax(dim=1).values
    real = document >= 0
    last_of_document = torch.cat([document[:, 1:] != document[:, :-1], torch.ones(rows, 1, dtype=torch.bool)], dim=1)
    labels = torch.cat([tokens[:, 1:], tokens.new_zeros(rows, 1)], dim=1).masked_fill(last_of_document | ~real, 0)
    span = torch.randint(0, 3, (rows, seq_length), generator=generator).to(torch.uint8)
    mask = real & ~last_of_document & (span > 0)
    return Batch(
        tokens=tokens.masked_fill(~real, 0),
        labels=labels,
        position_ids=torch.where(real, column - first, 0),
        document_id=document,
        loss_mask=mask,
        span_id=torch.where(mask, span, 0).to(torch.uint8),
        sample_ids=list(range(rows)),
    )


def rows_of(batch: Batch, begin: int, end: int) -> Batch:
    """Some rows of a batch, as a batch."""
    core = {name: value[begin:end] for name, value in vars(batch).items() if name != "annotations"}
    return Batch(**core, annotations={name: values[begin:end] for name, values in batch.annotations.items()})
