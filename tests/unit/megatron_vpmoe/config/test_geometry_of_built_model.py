"""The arithmetic counts exactly the parameters of the model that is built, in every variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vpmoe.config import load_config, parameter_count

NO_WARNING = "--router-dead-experts-warn null"
VARIANTS = {
    "the design": "",
    "no tensor products": "--no-tpa",
    "tensor products of other ranks": "--tpa-rank 1 --tpa-q-rank 3 --no-tpa-factor-bias",
    "plain": "--no-add-bias-linear --no-add-qkv-bias --no-qk-layernorm --softmax-type vanilla --no-value-residual",
    "rotary everywhere": "--local-position-embedding rope --global-position-embedding rope",
    "no window": "--window-size null --no-tpa",
    "dense SwiGLU": f"--num-experts null {NO_WARNING} --activation swiglu",
    "tied embeddings": "--no-untie-embeddings-and-output-weights",
    "no shared expert": "--moe-shared-expert-intermediate-size null",
    "sparse first layer": "--no-first-layer-dense --window-attn-skip-freq 3",
}


def built(cfg) -> int:
    from megatron_vpmoe.model.builder import build_model

    return sum(parameter.numel() for parameter in build_model(cfg, device=torch.device("meta")).parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(small: Path, single_process: None, name: str) -> None:
    cfg = load_config(small, VARIANTS[name].split())
    assert parameter_count(cfg).total == built(cfg)


def test_stage1(stage1: Path, single_process: None) -> None:
    cfg = load_config(stage1, ["--expert-model-parallel-size", "1"])
    assert parameter_count(cfg).total == built(cfg)
