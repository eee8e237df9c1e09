"""Rung 5: the deeper model is the same function, and its new layers can learn."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.unit.vpmoe.upcycle.tiny_rungs import dense_config, make, object_of, random_weights
from vpmoe.errors import UpcycleError
from vpmoe.upcycle import depth
from vpmoe.upcycle.depth import block_sources, layer_sources
from vpmoe.upcycle.inputs import checkpoint_of
from vpmoe.weights import LazyTensor, megatron_checkpoint
from vpmoe.weights.geometry import config_of, geometry_of, load_model, process_groups

PLACED = [1, 2, -1, -2, -1, -2, 3, 4]
"""Old layer by new layer, from 1; new layers negative."""


@pytest.mark.slow
def test_the_same_logits_at_twice_the_depth(tmp_path: Path) -> None:
    old, new = dense_config(num_layers=4), dense_config(num_layers=8)
    weights = random_weights(old)
    prompts = {"system": "You are deep.", "developer": None}
    below = object_of(tmp_path, "below", old, weights, prompts)
    report, deeper = make(tmp_path, "depth", new, below, prompt_lengths=[2, 9])
    assert report["verification"]["logit_difference"] == 0.0 < report["verification"]["logit_scale"]
    state = megatron_checkpoint.read_state(checkpoint_of(tmp_path / "made"))
    assert state["prompts"] == prompts == json.loads((tmp_path / "made/hf/config.json").read_text())["prompts"]
    signed = {int(k): v for k, v in report["conversion"]["old_layers"].items()}
    signed |= {int(k): -v for k, v in report["conversion"]["new_layers_copied_from"].items()}
    assert [signed[number] for number in range(1, 9)] == PLACED

    tokens = torch.arange(10)[None] % 32
    with process_groups():
        models = [
            load_model(config_of(geometry_of(cfg), source=""), found, source="")
            for cfg, found in ((old, weights), (new, deeper))
        ]
        first, second = (model(*_layout(tokens)) for model in models)
        assert torch.equal(first.logits(), second.logits())
        second.logits().square().mean().backward()
        for index, source in enumerate(PLACED):
            if source < 0:
                layer = models[1].decoder.layers[index]
                assert layer.self_attention.value_residual_scale == 1
                for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
                    assert not linear.weight.any() and not linear.bias.any()
                    assert linear.weight.grad.abs().sum() > 0
                copied = models[0].decoder.layers[-source - 1]
                assert torch.equal(layer.input_layernorm.weight, copied.input_layernorm.weight)


def _layout(tokens: torch.Tensor):
    from megatron_vpmoe.model.attention.masks import left_padded

    return left_padded(tokens.tolist(), torch.device("cpu"))


def test_thirteen_blocks_between_seven() -> None:
    """vpDense_28 -> vpDense_80: six gaps share them, and every old layer keeps its kind."""
    blocks = block_sources(7, 20)
    old = [index for index, (_, is_new) in enumerate(blocks) if not is_new]
    assert old[0] == 0 and old[-1] == 19 and len(old) == 7
    assert {after - before for before, after in itertools.pairwise(old)} == {3, 4}
    small, large = dense_config(num_layers=28), dense_config(num_layers=80)
    layers = layer_sources(small, large, source="test")
    assert len(layers) == 80 and layers[0] == (0, False)
    assert [copy for copy, is_new in layers if not is_new] == list(range(28))
    assert all(small.is_global_layer(a + 1) == large.is_global_layer(b + 1) for b, (a, _) in enumerate(layers))


@pytest.mark.slow
def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UpcycleError, match="4 -> 7 layers, where the schedule repeats every 2"):
        layer_sources(dense_config(num_layers=4), dense_config(num_layers=7), source="test")
    old = dense_config(num_layers=2)
    below = object_of(tmp_path, "below", old, random_weights(old))
    with pytest.raises(UpcycleError, match=r"model.window_size: 4 -> 6"):
        make(tmp_path, "depth", dense_config(num_layers=4, window_size=6), below)
    # A new layer that adds anything to the stream is found out.
    monkeypatch.setattr(depth, "_zeros", lambda like: LazyTensor.of(torch.full(like.shape, 1e-3)))
    with pytest.raises(UpcycleError, match="adding layers moves the logits by"):
        make(tmp_path, "depth", dense_config(num_layers=4), below)
    assert not (tmp_path / "made").exists()
