"""Rung 3, plain: the conversion is what it says, and its receipt measures what it loses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vpmoe.errors import NonFiniteError
from tests.tiny import tiny_config
from tests.unit.vpmoe.upcycle.tiny_rungs import PLAIN, TEXT, make, object_of, random_weights
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.rung_below import LogitDifference
from vpmoe.weights import LazyTensor

DIM, HIDDEN = 8, 16
NEW = {
    **PLAIN,
    "num_layers": 2,
    "padded_vocab_size": 320,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 8,
}
OLD = {
    **NEW,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 24,
    "activation": "swiglu",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": False,
}
SETTINGS: dict[str, Any] = {
    "attention": "meanpool",
    "feed_forward": "l2_topk",
    "texts": [TEXT],
    "text_tokens": 12,
}


@pytest.mark.slow
def test_heads_that_are_copies_are_pooled_without_loss(tmp_path: Path) -> None:
    """Old heads and groups in equal pairs: their mean is each of them, and the attention blocks are exact."""
    old = tiny_config(**OLD)
    weights = random_weights(old)
    for index in (0, 1):
        name = f"decoder.layers.{index}.self_attention.linear_qkv.weight"
        # Four groups of two queries, a key and a value; groups 1 and 3 are copies, as is each group's second query.
        mixed = weights[name].read().view(4, 4, DIM, HIDDEN).clone()
        mixed[1::2] = mixed[::2]
        mixed[:, 1] = mixed[:, 0]
        weights[name] = LazyTensor.of(mixed.view(-1, HIDDEN))
    below = object_of(tmp_path, "below", old, weights)
    report, new = make(tmp_path, "shape", tiny_config(**NEW), below, **SETTINGS)
    for errors in report["verification"]["relative_output_error"]["after"].values():
        assert errors["attention"] < 1e-5 and errors["feed_forward"] > 0.1
    found = report["verification"]
    assert found["perplexity"]["before"] == pytest.approx(math.exp(found["loss"]["before"]))
    assert found["loss"]["after"] != pytest.approx(found["loss"]["before"], abs=1e-3)
    assert torch.equal(new["output_layer.weight"].read(), weights["embedding.word_embeddings.weight"].read())


@pytest.mark.slow
def test_every_tensor_is_what_it_says(tmp_path: Path) -> None:
    old = tiny_config(**OLD)
    weights = random_weights(old)
    below = object_of(tmp_path, "below", old, weights)
    report, new = make(tmp_path, "shape", tiny_config(**NEW), below, **SETTINGS)
    before, after = (
        {name.removeprefix("decoder.layers.1."): tensor.read() for name, tensor in found.items()}
        for found in (weights, new)
    )
    mixed = before["self_attention.linear_qkv.weight"].view(4, 4, DIM, HIDDEN)
    pooled = after["self_attention.linear_qkv.weight"].view(2, 4, DIM, HIDDEN)
    for group in (0, 1):
        first, second = mixed[2 * group], mixed[2 * group + 1]
        torch.testing.assert_close(pooled[group, 0], first[:2].mean(0))
        torch.testing.assert_close(pooled[group, 1], second[:2].mean(0))
        torch.testing.assert_close(pooled[group, 2:], (first[2:] + second[2:]) / 2)
    columns = before["self_attention.linear_proj.weight"].view(HIDDEN, 4, 2, DIM)
    torch.testing.assert_close(
        after["self_attention.linear_proj.weight"], (columns[:, :, 0] + columns[:, :, 1]).flatten(1)
    )
    second = before["mlp.linear_fc2.weight"]
    kept = [i for i in range(24) if sum(bool(second[:, j].norm() > second[:, i].norm()) for j in range(24)) < 8]
    assert torch.equal(after["mlp.linear_fc2.weight"], second[:, kept])
    gate, up = before["mlp.linear_fc1.weight"].chunk(2)
    torch.testing.assert_close(after["mlp.linear_fc1.weight"], (gate[kept] + up[kept]) / 2)
    assert not any(tensor.any() for name, tensor in after.items() if name.endswith("bias"))
    assert torch.equal(after["self_attention.q_layernorm.weight"], before["self_attention.q_layernorm.weight"])
    assert all(
        error > 0.1
        for block in report["verification"]["relative_output_error"]["after"].values()
        for error in block.values()
    )

    with pytest.raises(UpcycleError, match=r"num_attention_heads: 8 -> 6"):
        make(tmp_path, "shape", tiny_config(**NEW | {"num_attention_heads": 6}), below, **SETTINGS)


@pytest.mark.slow
def test_a_nan_is_no_equality_and_no_figure_of_a_receipt(tmp_path: Path) -> None:
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, torch.nan, 0.0], [0.0, 0.0, 0.0]])
    for before, after in ((good, bad), (bad, good), (bad, bad)):
        with pytest.raises(NonFiniteError, match=r"logits (before|after): 1 of 6"):
            LogitDifference.between([before], [after])
    old = tiny_config(**OLD)
    weights = random_weights(old)
    weights["decoder.layers.1.mlp.linear_fc1.weight"].read()[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"decoder\.layers\.1\.mlp\.linear_fc1\.weight: 1 of"):
        make(tmp_path, "shape", tiny_config(**NEW), object_of(tmp_path, "below", old, weights), **SETTINGS)
