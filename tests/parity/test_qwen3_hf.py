"""Our Qwen3 is HF's: same logits, same greedy tokens with a key-value cache, and the same bits after the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_qwen3 import write_qwen3
from vpmoe.hf.convert import export_checkpoint, import_directory, open_directory, run_state
from vpmoe.hf.parity import compare

CASES = {
    "tied, head dim 128 above hidden / heads, padded": (256, {"head_dim": 128}),
    "tied, one layer": (None, {"num_hidden_layers": 1}),
    "untied, one group for all, padded": (
        224,
        {"tie_word_embeddings": False, "num_key_value_heads": 1, "num_attention_heads": 6},
    ),
    "untied, a group a head, another base and epsilon": (
        None,
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rms_norm_eps": 1e-5,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_model_and_the_way_back(name: str, tmp_path: Path) -> None:
    padded, shape = CASES[name]
    folder = write_qwen3(tmp_path / "hf", **shape)
    model = open_directory(folder, padded_vocab_size=padded)
    assert model.cfg.model.padded_vocab_size == (padded or 211)
    imported = import_directory(model, tmp_path / "megatron")

    found = compare(folder, imported.path, greedy_steps=64)
    assert found.logits.scale > 1
    assert found.logits.largest <= 1e-4
    assert found.greedy_identical

    exported = export_checkpoint(imported.path, tmp_path / "back")
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, exported.path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    again = import_directory(open_directory(exported.path, padded_vocab_size=padded), tmp_path / "again")
    assert again.weights_sha256 == imported.weights_sha256


def test_a_bf16_directory_keeps_its_bits(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path / "hf", dtype=torch.bfloat16)
    imported = import_directory(open_directory(folder), tmp_path / "megatron")
    exported = export_checkpoint(imported.path, tmp_path / "back")
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, exported.path))
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_the_comparison_sees_a_wrong_layout(tmp_path: Path) -> None:
    """Queries, keys and values one after another instead of per group: what the parity test has to catch."""
    from vpmoe.weights.megatron_checkpoint import read_weights, write_checkpoint
    from vpmoe.weights.tensors import LazyTensor

    folder = write_qwen3(tmp_path / "hf")
    model = open_directory(folder)
    imported = import_directory(model, tmp_path / "megatron")
    weights = read_weights(imported.path)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    mixed = weights[name].read().unflatten(0, (2, 4, 16))
    weights[name] = LazyTensor.of(
        torch.cat([mixed[:, :2].flatten(0, 2), mixed[:, 2].flatten(0, 1), mixed[:, 3].flatten(0, 1)])
    )
    wrong, _ = write_checkpoint(tmp_path / "wrong", weights, run_state(model.cfg, model.carried))
    found = compare(folder, wrong, greedy_steps=4, prompt_lengths=(9,))
    assert found.logits.largest > 0.1
