"""Objects of tiny geometry and random weights, to run a job on without the rungs below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.model.attention.grape import initial_log_frequencies
from tests.tiny import tiny_config
from tests.unit.vpmoe.upcycle.tiny_vocabularies import write_tokenizer
from vpmoe.hf.convert import Carried, run_state
from vpmoe.upcycle import runner
from vpmoe.upcycle.inputs import Input
from vpmoe.upcycle.job import job_of
from vpmoe.upcycle.ladder_file import ObjectSpec
from vpmoe.weights import megatron_checkpoint
from vpmoe.weights.geometry import expected_shapes
from vpmoe.weights.tensors import LazyTensor

DENSE = {
    "num_experts": None,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "padded_vocab_size": 32,
    "window_size": 4,
    "window_attn_skip_freq": 2,
}


# As rung 3 has it: full causal attention with RoPE.
PLAIN = {
    **DENSE,
    "softmax_type": "vanilla",
    "window_size": None,
    "global_position_embedding": "rope",
    "tpa": False,
    "value_residual": False,
}
TEXT = "the ship left the harbour before dawn; the harbour was still. 1 2 3 4 5 and 1234567890. "


def dense_config(**changes: object) -> RunConfig:
    """A dense student, two layers to a block of the schedule."""
    return tiny_config(**{**DENSE, **changes})


def random_weights(cfg: RunConfig, seed: int = 0) -> dict[str, LazyTensor]:
    """Weights with nothing at a neutral value."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(cfg).items():
        value, last = torch.randn(shape, generator=generator), name.rsplit(".", 1)[-1]
        if last == "grape_log_freq":
            value += initial_log_frequencies(2 * shape[0], cfg.model.rotary_base, cfg.model.grapem_log_freq_scale)
        elif last == "value_residual_scale":
            value = 0.6 + 0.1 * value
        elif "norm" in name:
            value = 1 + 0.3 * value
        elif last in ("sink", "expert_bias") or "bias" in last:
            value *= 0.3
        elif "embedding" not in name:
            value *= 1.5 * shape[-1] ** -0.5
        weights[name] = LazyTensor.of(value)
    return weights


def object_of(
    folder: Path,
    identifier: str,
    cfg: RunConfig,
    weights: dict[str, LazyTensor],
    prompts: dict[str, str | None] | None = None,
) -> Input:
    """A derived object on disk, as far as a job reads it; a vocabulary of more than bytes has its tokenizer."""
    state = run_state(cfg, Carried(cfg.model.padded_vocab_size, {}, prompts))
    megatron_checkpoint.write_checkpoint(folder / identifier / "megatron", weights, state)
    if cfg.model.padded_vocab_size > 256:
        assert write_tokenizer(folder / identifier / "hf", TEXT * 4, [], 300) <= cfg.model.padded_vocab_size
    spec = ObjectSpec(id=identifier, rung=1, path=str(folder / identifier), job="made elsewhere")
    return Input(spec, cfg, {}, None)


def make(
    folder: Path, job: str, cfg: RunConfig, model: Input, **settings: Any
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Run a job on one input: what the receipt reports, and the new object's weights."""
    spec = ObjectSpec(id="made", rung=2, path=str(folder / "made"), job=job)
    instance = job_of(job, source="test")
    planned = runner.Planned(
        spec,
        cfg,
        instance,
        instance.settings_type.model_validate(settings),
        {"model": model},
    )
    report = runner.run(planned, overwrite=True, quiet=True)["report"]
    checkpoint = megatron_checkpoint.checkpoint_in(folder / "made" / "megatron")
    return report, megatron_checkpoint.read_weights(checkpoint)
