"""Every rung as an HF model: equal logits, generation with and without cache, padded batches, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_student import write_student
from vpmoe.errors import WeightsError
from vpmoe.hf.convert import export_checkpoint, import_directory, open_directory
from vpmoe.hf.parity import compare

SMALL = {"num_layers": 2, "window_attn_skip_freq": 2, "window_size": 4, "hidden_size": 16, "ffn_hidden_size": 24}
DENSE = {**SMALL, "num_experts": None}
PLAIN = {"tpa": False, "value_residual": False, "softmax_type": "vanilla", "window_size": None}
RUNGS = {
    "vpMoE": {**SMALL, "num_layers": 4},
    "vpDense_28": DENSE,
    "vpDense0-5_28": {**DENSE, **PLAIN, "global_position_embedding": "rope"},
    "softmax router, no groups, no shared expert, no biases": {
        **SMALL,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_shared_expert_intermediate_size": None,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "tpa_factor_bias": False,
    },
    "tied, gated experts in all layers but two": {
        **SMALL,
        "num_layers": 4,
        "activation": "swiglu",
        "first_dense_layers": 2,
        "untie_embeddings_and_output_weights": False,
    },
    "tied SwiGLU, GRAPE-M everywhere": {
        **DENSE,
        "activation": "swiglu",
        "untie_embeddings_and_output_weights": False,
        "global_position_embedding": "grape_m",
        "num_attention_heads": 6,
    },
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the mixture, with every part of the design."""
    return write_student(tmp_path_factory.mktemp("mixture"), kept={"eos_token_id": 5}, **RUNGS["vpMoE"])


@pytest.fixture(scope="module")
def exported(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(mixture, tmp_path_factory.mktemp("exported") / "hf").path


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNGS)
def test_same_model_and_the_way_back(name: str, tmp_path: Path) -> None:
    checkpoint = write_student(tmp_path / "megatron", kept={"eos_token_id": 5}, **RUNGS[name])
    written = export_checkpoint(checkpoint, tmp_path / "hf")
    # Longer than the window, and decoded past it.
    found = compare(written.path, checkpoint, prompt_lengths=(3, 11), greedy_steps=6)
    assert found.logits.scale > 0.5
    assert found.logits.largest <= 1e-4
    assert found.greedy_identical
    again = import_directory(open_directory(written.path), tmp_path / "again")
    assert again.tensor_sha256.keys() == open_directory(written.path).weights.keys()
    assert export_checkpoint(again.path, tmp_path / "back").weights_sha256 == written.weights_sha256


def test_generation_with_and_without_cache_alone_and_in_a_padded_batch(exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    prompts = [[7, 8, 9], list(range(10, 21))]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [
        [model.generate(torch.tensor([p]), use_cache=cached, **options)[0, len(p) :].tolist() for p in prompts]
        for cached in (True, False)
    ]
    assert alone[0] == alone[1]
    rows = torch.tensor([[0] * 8 + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * 8 + [1] * 3, [1] * 11])
    together = model.generate(rows, attention_mask=mask, use_cache=True, **options)[:, 11:].tolist()
    assert together == alone[0]
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    loss = model(rows, attention_mask=mask, labels=rows).loss
    assert torch.isfinite(loss)


def test_bf16_keeps_the_fp32_islands(mixture: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    written = export_checkpoint(mixture, tmp_path / "hf", dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(written.path, trust_remote_code=True)
    state = model.state_dict()
    fp32 = {name.rsplit(".", 1)[1] for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert fp32 == {"sink", "grape_log_freq", "value_residual_scale", "expert_bias"}
    assert state["lm_head.weight"].dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_shards_hold_what_one_file_does(mixture: Path, exported: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole: Any = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    written = export_checkpoint(mixture, tmp_path / "hf", shard_bytes=20_000)
    assert len(list(written.path.glob("model-*.safetensors"))) > 1
    parts: Any = AutoModelForCausalLM.from_pretrained(written.path, trust_remote_code=True)
    assert all(torch.equal(tensor, parts.state_dict()[name]) for name, tensor in whole.state_dict().items())
    again = import_directory(open_directory(written.path), tmp_path / "again")
    assert again.weights_sha256 == import_directory(open_directory(exported), tmp_path / "one").weights_sha256


@pytest.mark.parametrize("dtype", ["float16", [1]])
def test_a_router_dtype_that_is_none_of_ours_is_named(exported: Path, tmp_path: Path, dtype: object) -> None:
    (tmp_path / "model.safetensors").symlink_to(exported / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "router_dtype": dtype}))
    with pytest.raises(WeightsError, match="moe_router_dtype = "):
        open_directory(tmp_path)


def test_an_export_from_before_a_field_was_renamed_opens(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(exported / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())
    assert config.pop("first_dense_layers") == 1
    (tmp_path / "config.json").write_text(json.dumps({**config, "first_layer_dense": True}))
    assert open_directory(tmp_path).cfg == open_directory(exported).cfg
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="first_dense_layers"):
        open_directory(tmp_path)


@pytest.mark.slow
def test_padding_rows_stay_out_of_every_export(tmp_path: Path) -> None:
    checkpoint = write_student(tmp_path / "megatron", vocab_size=60, **DENSE)
    written = export_checkpoint(checkpoint, tmp_path / "hf").path
    assert json.loads((written / "config.json").read_text())["vocab_size"] == 60
    found = compare(written, checkpoint, prompt_lengths=(3,), greedy_steps=2)
    assert found.logits.largest <= 1e-4
    for rows in (60, 64):
        assert open_directory(written, padded_vocab_size=rows).weights["output_layer.weight"].shape == (rows, 16)


def test_layers_without_modules_are_refused(tmp_path: Path) -> None:
    state_space = {"num_experts": None, "layer_type": "state_space", "num_layers": 2}
    checkpoint = write_student(tmp_path / "checkpoint", **state_space)
    with pytest.raises(WeightsError, match="no modules for layers of type state_space"):
        export_checkpoint(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
