"""Sizes by arithmetic: the published totals, and counts that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.config import (
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    layer_geometries,
    load_config,
    parameter_count,
    training_flops_per_token,
)
from megatron_vpmoe.config.layer_geometry import attention_parameters, mean_keys


def test_stage1_has_the_published_size(stage1: Path) -> None:
    count = parameter_count(load_config(stage1))
    assert count.total == pytest.approx(6.02e9, rel=2e-3)
    assert count.active == pytest.approx(780e6, rel=2e-3)
    assert count.active_without_embeddings == pytest.approx(368e6, rel=4e-3)
    assert count.total == sum(count.parts.values())


def test_stage1_without_biases_and_norms_has_the_published_active_size(stage1: Path) -> None:
    """The published 780 M / 368 M count matrices: what is left of ours is biases, norms, sinks and frequencies."""
    bare = "--no-add-bias-linear --no-add-qkv-bias --no-tpa-factor-bias --no-qk-layernorm --no-value-residual"
    flags = [*bare.split(), "--softmax-type", "vanilla", "--local-position-embedding", "rope"]
    count = parameter_count(load_config(stage1, flags))
    matrices = count.active - count.parts["norms"]
    assert round(matrices / 1e6) == 780
    assert round((matrices - 2 * 201088 * 1024) / 1e6) == 368


def test_qwen3_by_its_published_geometry(repository: Path) -> None:
    """28 layers, hidden 1024, 16 query and 8 key/value heads of 128, SwiGLU of 3072, vocabulary 151,936, tied."""
    layer = 1024 * (16 + 2 * 8) * 128 + 16 * 128 * 1024 + 3 * 1024 * 3072 + 2 * 128 + 2 * 1024
    total = 28 * layer + 1024 + 151936 * 1024
    assert (total, total + 151936 * 1024) == (596_049_920, 751_632_384)
    path = repository / "configs" / "qwen3_0_6b.yaml"
    assert parameter_count(load_config(path)).total == total
    untied = load_config(path, ["--untie-embeddings-and-output-weights"])
    assert parameter_count(untied).total == total + 151936 * 1024


def test_layer_kinds_of_stage1(stage1: Path) -> None:
    cfg = load_config(stage1)
    layers = range(1, 81)
    assert [n for n in layers if cfg.is_global_layer(n)] == list(range(4, 81, 4))
    assert [n for n in layers if not cfg.is_moe_layer(n)] == [1]


def test_attention_by_hand(small: Path) -> None:
    """h=128, H=4, G=2, d=32, R=2, R_q=4: the sums of docs and papers, written out."""
    cfg = load_config(small)
    shared = (128 * 128 + 128) + 2 * 32 + 4 + (4 + 2 * 2) * 32  # projection, QK-norms, sinks, QKV bias
    a_rows, b_rows = 4 * 4 + 2 * 2 * 2, (4 + 2 * 2) * 32
    local = shared + a_rows * 128 + a_rows + b_rows * 128 + 32 // 2  # factors, their bias, frequencies
    assert attention_parameters(cfg, 1) == local
    assert attention_parameters(cfg, 2) == local + 1  # the value residual's scalar
    assert attention_parameters(cfg, 4) == shared + (4 + 2 * 2) * 32 * 128 + 1


def test_feed_forward_and_vocabulary_by_hand(small: Path) -> None:
    parts = parameter_count(load_config(small)).parts
    assert parts["embedding"] == parts["output layer"] == 512 * 128
    assert parts["dense feed-forward"] == 2 * 128 * 128 + 128 + 128
    assert parts["routed experts"] == 7 * 16 * (2 * 128 * 32 + 32 + 128)
    assert parts["router"] == 7 * 16 * 128
    assert parts["norms"] == 17 * 128


def test_variants(small: Path) -> None:
    base = parameter_count(load_config(small))
    tied = parameter_count(load_config(small, ["--no-untie-embeddings-and-output-weights"]))
    assert base.total - tied.total == 512 * 128
    no_window = load_config(small, ["--window-size", "null", "--no-tpa"])
    assert parameter_count(no_window).parts["attention, local"] == 0
    dense = load_config(
        small, ["--num-experts", "null", "--router-dead-experts-warn", "null", "--activation", "swiglu"]
    )
    assert parameter_count(dense).parts["routed experts"] == 0
    assert parameter_count(dense).parts["dense feed-forward"] == 8 * (128 * 256 + 256 + 128 * 128 + 128)
    assert parameter_count(dense).active == parameter_count(dense).total


@given(length=st.integers(1, 200), window=st.integers(1, 200))
def test_mean_keys_equals_counting_them(length: int, window: int) -> None:
    counted = sum(min(i + 1, window) for i in range(length)) / length
    assert mean_keys(length, window) == pytest.approx(counted)
    assert mean_keys(length, None) == pytest.approx((length + 1) / 2)


def test_flops(stage1: Path) -> None:
    """Two FLOPs a parameter in a product, plus attention over the keys in sight; backward costs twice forward."""
    cfg = load_config(stage1)
    count = parameter_count(cfg)
    products = 2 * (count.active - count.parts["embedding"])
    scores = 2 * 2 * 1024 * (60 * mean_keys(2048, 128) + 20 * mean_keys(2048, None))
    assert forward_flops_per_token(cfg) == pytest.approx(products + scores, rel=5e-3)
    assert training_flops_per_token(cfg) == 3 * forward_flops_per_token(cfg)
    assert forward_flops_per_token(cfg, 4096) > forward_flops_per_token(cfg)


@pytest.mark.parametrize("name", ["vpmoe_stage1.yaml", "qwen3_0_6b.yaml", "nano/stage1.yaml"])
def test_layers_sum_to_the_model(repository: Path, name: str) -> None:
    cfg = load_config(repository / "configs" / name)
    count, layers = parameter_count(cfg), layer_geometries(cfg)
    around = count.parts["embedding"] + count.parts["output layer"] + cfg.model.hidden_size
    assert sum(layer.parameters for layer in layers) + around == count.total
    assert sum(layer.active_parameters for layer in layers) + around == count.active


def test_the_layer_table_of_stage1(stage1: Path) -> None:
    """All 80 rows: 4, 8, ..., 80 are global, layer 1 is dense, and each kind has its projections and positions."""
    rows = [(n.number, n.window, n.tensor_product, n.position, n.sparse) for n in layer_geometries(load_config(stage1))]
    local, whole = (128, True, "grape_m"), (None, False, "grape_a")
    assert rows == [(n, *(whole if n % 4 == 0 else local), n > 1) for n in range(1, 81)]


def test_what_a_layer_keeps_and_sees(stage1: Path) -> None:
    local, whole = layer_geometries(load_config(stage1))[2:4]
    assert (local.cached_tokens(2048), local.cached_tokens(50), whole.cached_tokens(2048)) == (127, 50, 2048)
    assert local.attention_flops(10**6) == pytest.approx(4 * 8 * 128 * 128, rel=1e-4)  # W keys, however long S is
    assert whole.attention_flops(4095) == 4 * 8 * 128 * 2048  # (S + 1) / 2 keys on average
    assert local.flops(2048) == local.product_flops + local.attention_flops(2048)


def test_cache(stage1: Path, small: Path) -> None:
    assert kv_cache_bytes_per_token(load_config(stage1)) == 80 * 2 * 2 * 128 * 2
    assert kv_cache_bytes_per_token(load_config(small)) == 8 * 2 * 2 * 32 * 4
