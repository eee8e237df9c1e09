"""The 80 layers of stage 1 as the design lists them, asserted of the built model (on the meta device)."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_vpmoe.config import load_config
from megatron_vpmoe.model.builder import build_model
from tests.tiny import ROOT

GLOBAL = {4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 80}


@pytest.mark.usefixtures("single_process")
def test_eighty_layers_of_stage_1() -> None:
    model = build_model(
        load_config(ROOT / "configs" / "vpmoe_stage1.yaml", ["--expert-model-parallel-size", "1"]),
        device=torch.device("meta"),
    )
    built = []
    for layer in model.decoder.layers:
        attention, names = layer.self_attention, {name for name, _ in layer.named_parameters()}
        built.append(
            {
                "layer": layer.layer_number,
                "window": attention.window,
                "positions": attention.position_embedding,
                "learnt frequencies": "self_attention.grape_log_freq" in names,
                "tensor product": "self_attention.linear_tpa_b.weight" in names,
                "grouped query": "self_attention.linear_qkv.weight" in names,
                "sink": "self_attention.sink" in names,
                "value residual": "self_attention.value_residual_scale" in names,
                "experts": layer.mlp.experts.fc1_weight.shape[0] if isinstance(layer.mlp, MoELayer) else 0,
                "shared expert": "mlp.shared_experts.linear_fc1.weight" in names,
            }
        )
    assert built == [
        {
            "layer": n,
            "window": None if n in GLOBAL else 128,
            "positions": "grape_a" if n in GLOBAL else "grape_m",
            "learnt frequencies": n not in GLOBAL,
            "tensor product": n not in GLOBAL,
            "grouped query": n in GLOBAL,
            "sink": True,
            "value residual": n > 1,
            "experts": 0 if n == 1 else 256,
            "shared expert": n > 1,
        }
        for n in range(1, 81)
    ]
