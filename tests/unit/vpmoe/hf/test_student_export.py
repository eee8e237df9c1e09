"""Every rung as an HF model: equal logits, generation with and without cache, padded batches, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_config
from vpmoe.hf.convert import export_checkpoint, import_directory, open_directory, run_state
from vpmoe.hf.parity import compare
from vpmoe.weights.geometry import process_groups
from vpmoe.weights.megatron_checkpoint import write_checkpoint
from vpmoe.weights.tensors import LazyTensor

DENSE = {"num_experts": None}
PLAIN = {"tpa": False, "value_residual": False, "softmax_type": "vanilla", "window_size": None}
RUNGS = {
    "vpMoE": {},
    "vpDense_28": DENSE,
    "vpDense0-5_28": {**DENSE, **PLAIN, "global_position_embedding": "rope"},
    "softmax router, no groups, no shared expert, no biases": {
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_shared_expert_intermediate_size": None,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "tpa_factor_bias": False,
    },
    "tied SwiGLU, GRAPE-M everywhere": {
        **DENSE,
        "activation": "swiglu",
        "untie_embeddings_and_output_weights": False,
        "global_position_embedding": "grape_m",
        "num_attention_heads": 6,
    },
}


def checkpoint_of(folder: Path, **changes: Any) -> Path:
    """A tiny rung of random weights, none of them where it started (sinks, frequencies, expert biases included)."""
    from megatron_vpmoe.model.builder import build_model

    cfg = tiny_config(**changes)
    torch.manual_seed(3)
    with process_groups(), torch.no_grad():
        model = build_model(cfg)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * (0.3 if "weight" in name else 0.1))
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    weights = {name: LazyTensor.of(value) for name, value in state.items()}
    return write_checkpoint(folder, weights, run_state(cfg, vocab_size=64, kept={"eos_token_id": 5}))[0]


@pytest.mark.parametrize("name", RUNGS)
def test_same_model_and_the_way_back(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "megatron", **RUNGS[name])
    exported = export_checkpoint(checkpoint, tmp_path / "hf")
    # Longer than the window of 8, and decoded past it.
    found = compare(exported.path, checkpoint, prompt_lengths=(3, 21), greedy_steps=16)
    assert found.logit_scale > 0.5
    assert found.logit_difference <= 1e-4
    assert found.greedy_identical
    again = import_directory(open_directory(exported.path), tmp_path / "again")
    assert again.tensor_sha256.keys() == open_directory(exported.path).weights.keys()
    assert export_checkpoint(again.path, tmp_path / "back").weights_sha256 == exported.weights_sha256


def test_generation_with_and_without_cache_alone_and_in_a_padded_batch(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    exported = export_checkpoint(checkpoint_of(tmp_path / "megatron"), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(exported.path, trust_remote_code=True)
    prompts = [[7, 8, 9], list(range(10, 31))]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [
        [model.generate(torch.tensor([p]), use_cache=cached, **options)[0, len(p) :].tolist() for p in prompts]
        for cached in (True, False)
    ]
    assert alone[0] == alone[1]
    rows = torch.tensor([[0] * 18 + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * 18 + [1] * 3, [1] * 21])
    together = model.generate(rows, attention_mask=mask, use_cache=True, **options)[:, 21:].tolist()
    assert together == alone[0]
    assert model.config.layer_types == ["sliding_attention"] * 3 + ["full_attention"]
    loss = model(rows, attention_mask=mask, labels=rows).loss
    assert torch.isfinite(loss)


def test_bf16_keeps_the_fp32_islands(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = checkpoint_of(tmp_path / "megatron")
    exported = export_checkpoint(checkpoint, tmp_path / "hf", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(exported.path, trust_remote_code=True)
    state = model.state_dict()
    fp32 = {name.rsplit(".", 1)[1] for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert fp32 == {"sink", "grape_log_freq", "value_residual_scale", "expert_bias"}
    assert state["lm_head.weight"].dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
