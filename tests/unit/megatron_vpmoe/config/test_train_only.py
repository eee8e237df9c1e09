"""``train_only``: what is wrong with a pattern is said before anything is built; what it saves is estimated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vpmoe.config import load_config, memory_estimate
from megatron_vpmoe.config.parameters import is_trained, parameter_sizes
from megatron_vpmoe.config.provenance import provenance_diff
from megatron_vpmoe.errors import ConfigError


def test_a_pattern_without_a_match_is_named_with_its_place_and_near_names(child: Callable[..., Path]) -> None:
    path = child("training: {train_only: ['*.mlp.router.weight', 'output_layers.weight']}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    said = str(caught.value)
    assert f"{path}:2" in said and "no parameter matches 'output_layers.weight'; near: output_layer.weight" in said
    assert "router" not in said


def test_patterns_name_whole_parameters_of_this_model(small: Path) -> None:
    cfg = load_config(small, ["--train-only", "[decoder.layers.3.*, '*.router.weight', embedding.*]"])
    trained = [name for name in parameter_sizes(cfg) if is_trained(cfg, name)]
    assert {name.split(".")[2] for name in trained if name.startswith("decoder") and "router" not in name} == {"3"}
    assert sum(name.endswith("router.weight") for name in trained) == 7
    tied = ["--train-only", "[output_layer.weight]", "--no-untie-embeddings-and-output-weights"]
    with pytest.raises(ConfigError, match=r"no parameter matches 'output_layer\.weight'"):
        load_config(small, tied)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("[]", "an empty list trains nothing"),
        ("['*.linear_qkv.bias']", r"layers\.3\.self_attention\.linear_qkv\.weight"),
    ],
)
def test_what_would_train_nothing_is_refused(small: Path, patterns: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(small, ["--train-only", patterns])


def test_frozen_parameters_take_no_gradients_and_no_state(small: Path) -> None:
    one = ["--nproc-per-node", "1", "--bf16"]
    whole = memory_estimate(load_config(small, one)).parts
    cfg = load_config(small, [*one, "--train-only", "[embedding.word_embeddings.weight]"])
    part, embedding = memory_estimate(cfg).parts, 512 * 128
    assert part["parameters"] == whole["parameters"]
    assert (part["gradients"], part["optimizer state"]) == (4 * embedding, 12 * embedding)
    assert whole["loss"] - part["loss"] == 4 * embedding  # the gradient of the output projection, summed in fp32


def test_a_run_is_bound_to_what_it_trains(small: Path) -> None:
    before, after = (load_config(small, words).model_dump(mode="json") for words in ([], ["--train-only", "['*']"]))
    assert [change.key for change in provenance_diff(before, after)] == ["training.train_only"]
    del before["training"]["train_only"]  # a checkpoint from before there was such a field
    assert provenance_diff(before, load_config(small).model_dump(mode="json")) == []
