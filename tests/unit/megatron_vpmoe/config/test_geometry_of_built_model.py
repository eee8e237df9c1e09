"""The arithmetic counts exactly the parameters of the model that is built, in every variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vpmoe.config import load_config, parameter_count
from megatron_vpmoe.config.parameters import parameter_sizes

NO_WARNING = "--router-dead-experts-warn null"
PLAIN = (
    f"--num-experts null {NO_WARNING} --activation swiglu --softmax-type vanilla --window-size null --no-tpa "
    "--global-position-embedding rope --num-query-groups 4 --no-value-residual --no-qk-layernorm --no-add-bias-linear "
    "--no-add-qkv-bias --no-untie-embeddings-and-output-weights"
)
VARIANTS = {
    "the design": "",
    "no tensor products": "--no-tpa",
    "tensor products of other ranks": "--tpa-rank 1 --tpa-q-rank 3 --no-tpa-factor-bias",
    "plain": "--no-add-bias-linear --no-add-qkv-bias --no-qk-layernorm --softmax-type vanilla --no-value-residual",
    "rotary everywhere": "--local-position-embedding rope --global-position-embedding rope",
    "no window": "--window-size null --no-tpa",
    "dense SwiGLU": f"--num-experts null {NO_WARNING} --activation swiglu",
    "gated experts": "--activation swiglu",
    "tied embeddings": "--no-untie-embeddings-and-output-weights",
    "no shared expert": "--moe-shared-expert-intermediate-size null",
    "state space": f"--num-experts null {NO_WARNING} --layer-type state_space --ssm-inner-size 40 --ssm-step-rank 3",
    "denoiser": f"{PLAIN} --layer-type denoiser --objective denoising --train-only [decoder.*] --sample-interval null",
    "mixture": f"{PLAIN} --layer-type mixture --train-only [decoder.adapters.*] --ssm-step-rank 3 --mixture-experts "
    '[{"layer_type":"denoiser","num_layers":2},{"layer_type":"state_space","num_layers":3}]',
    "sparse first layer": "--first-dense-layers 0 --window-attn-skip-freq 3",
}
# Qwen3-0.6B's is the published number of parameters.
SHIPPED = {
    "qwen3_0_6b.yaml": 596_049_920,
    "qwen3_0_6b_o200k.yaml": 646_381_568,
    "vpdense0_5_28.yaml": 514_768_896,
    "vpdense_28.yaml": 504_621_443,
    "vpdense_80.yaml": 676_949_807,
    "vpmoe_stage1.yaml": 6_022_557_487,
    "nano/qwen3.yaml": 2_017_920,
    "nano/qwen3_o200k.yaml": 2_034_304,
    "nano/vpdense0_5_8.yaml": 794_240,
    "nano/vpdense_8.yaml": 812_951,
    "nano/vpdense_16.yaml": 1_494_703,
    "nano/vpmoe_16.yaml": 3_529_903,
    "nano/stage1.yaml": 879_115,
    "nano_moe/nano_moe.yaml": 11_327_424,
    "nano_moe/tiny.yaml": 3_054_720,
    "nano_moe/small.yaml": 29_057_280,
    "nano_moe/medium.yaml": 252_424_704,
    "nano_moe/large.yaml": 1_283_228_672,
    "nano_moe/moonlet.yaml": 897_737_728,
    "nano_moe/moonlight.yaml": 15_928_244_224,
    "think/transformer.yaml": 26_448_768,
    "think/state_space.yaml": 18_073_728,
    "think/diffuser.yaml": 25_719_936,
    "think/mixture.yaml": 46_601_952,
    "think/nano/mixture.yaml": 2_441_760,
    "think/nano/diffuser.yaml": 1_199_488,
    "think/nano/transformer.yaml": 852_864,
    "think/nano/state_space.yaml": 415_488,
}


def built(cfg) -> int:
    """Elements of the built model's parameters, whose names and sizes are held to the arithmetic's first."""
    from megatron_vpmoe.model.builder import build_model

    sizes = {name: p.numel() for name, p in build_model(cfg, device=torch.device("meta")).named_parameters()}
    assert parameter_sizes(cfg) == sizes
    return sum(sizes.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(small: Path, single_process: None, name: str) -> None:
    cfg = load_config(small, VARIANTS[name].split())
    assert parameter_count(cfg).total == built(cfg)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped(repository: Path, single_process: None, name: str) -> None:
    cfg = load_config(repository / "configs" / name, ["--expert-model-parallel-size", "1"])
    assert parameter_count(cfg).total == built(cfg) == SHIPPED[name]


def test_nano_moe_is_the_size_that_was_asked_for(repository: Path) -> None:
    """11.33 M parameters, 7.79 M active; its vocabulary has no padding."""
    cfg = load_config(repository / "configs" / "nano_moe" / "nano_moe.yaml")
    count = parameter_count(cfg)
    assert (count.total, count.active, cfg.model.padded_vocab_size) == (11_327_424, 7_788_480, 10_000)


def test_the_docs_have_the_sizes(repository: Path) -> None:
    documented = (repository / "docs" / "architecture.md").read_text()
    for name in SHIPPED:
        if "nano/" not in name:
            count = parameter_count(load_config(repository / "configs" / name))
            assert f"{count.total:,}" in documented and f"{count.active_without_embeddings:,}" in documented, name
