"""Rung 6: routed experts that leave the function as it was, and that learn from the first steps on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.tiny import random_batch, tiny_config
from tests.unit.vpmoe.upcycle.tiny_rungs import DENSE, dense_config, make, object_of, random_weights
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.experts import Conversion, ExpertsSettings, converted
from vpmoe.weights.geometry import config_of, geometry_of, load_model, process_groups

SPARSE: dict[str, Any] = {
    **DENSE,
    "num_layers": 2,
    "num_experts": 16,
    "moe_ffn_hidden_size": 8,
    "moe_shared_expert_intermediate_size": 32,
    "moe_router_topk": 4,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize(("init", "exact"), [("zero_out", True), ("virtual_groups", True), ("copy_plus_noise", False)])
def test_the_receipt_says_how_exact_it_is(init: str, exact: bool, tmp_path: Path) -> None:
    old = dense_config(num_layers=2)
    below = object_of(tmp_path, "below", old, random_weights(old))
    report, sparse = make(
        tmp_path, "experts", tiny_config(**SPARSE), below, init_experts=init, prompt_lengths=[2, 12], reach_tokens=300
    )
    found = report["verification"]
    assert found["exact"] is exact and found["in_fp32"]["logit_scale"] > 1
    if exact:
        assert found["in_fp32"]["logit_difference"] <= 1e-5
    else:
        assert found["in_fp32"]["logit_difference"] > 1e-2
    assert found["as_written"] == found["in_fp32"]
    reached = found["experts_reached"]["by_layer"]
    assert reached.keys() == {"2"} and 4 <= reached["2"] <= 16
    assert init != "virtual_groups" or reached["2"] % 4 == 0
    assert "decoder.layers.0.mlp.linear_fc1.weight" in sparse
    experts = sparse["decoder.layers.1.mlp.experts.fc1_weight"].read()
    assert torch.equal(experts[0], experts[4]) is (init == "virtual_groups")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"moe_router_topk": 8, "moe_router_group_topk": 2},
        {"moe_router_num_groups": None, "moe_router_group_topk": None},
        {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
        {"moe_router_topk_scaling_factor": 1.0, "add_bias_linear": False},
        {"activation": "swiglu"},
    ],
)
def test_virtual_groups_under_other_routers_and_with_a_gate(changes: dict[str, Any]) -> None:
    dense = {name: value for name, value in changes.items() if name in ("add_bias_linear", "activation")}
    old, new = dense_config(num_layers=2, **dense), tiny_config(**SPARSE | changes)
    weights = random_weights(old)
    conversion = Conversion.of(new, old, ExpertsSettings(routed_fraction=0.7), source="test")
    before, after = (logits(cfg, found) for cfg, found in ((old, weights), (new, converted(weights, conversion))))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def logits(cfg: Any, weights: Any) -> torch.Tensor:
    with process_groups(), torch.no_grad():
        return forward(load_model(config_of(geometry_of(cfg), source=""), weights, source="")).logits()


def forward(model: Any) -> Any:
    from megatron_vpmoe.model.attention.masks import left_padded

    generator = torch.Generator().manual_seed(0)
    return model(*left_padded(torch.randint(0, 32, (8, 12), generator=generator).tolist(), torch.device("cpu")))


@pytest.mark.parametrize("init", ["zero_out", "virtual_groups", "copy_plus_noise"])
def test_training_moves_every_expert_and_router_row_within_the_first_steps(init: Any) -> None:
    """NorMuon skips an expert without tokens: what has moved has had a gradient."""
    from megatron_vpmoe.model.builder import wrap_for_training
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.optim import build_optimizer
    from megatron_vpmoe.training.step import train_step

    old, new = dense_config(num_layers=2), tiny_config(**SPARSE, weight_decay=0.0)
    conversion = Conversion.of(new, old, ExpertsSettings(init_experts=init), source="test")
    weights = converted(random_weights(old), conversion)
    with process_groups():
        model = load_model(new, weights, source="").train()
        wrapped = wrap_for_training(model, new)
        optimizer, objective = build_optimizer([wrapped], new), build_objective(new)
        for step in range(10):
            train_step(wrapped, optimizer, objective, [random_batch(2, 48, 32, seed) for seed in (step, 100 + step)])
        mlp: Any = model.decoder.layers[1].mlp
        for name in ("router.weight", "experts.fc1_weight", "experts.fc2_weight", "experts.fc2_bias"):
            before = weights[f"decoder.layers.1.mlp.{name}"].read()
            moved = (mlp.get_parameter(name).detach() - before).flatten(1).norm(dim=1)
            assert bool((moved > 0).all()), (name, moved)


def test_what_is_refused() -> None:
    old = dense_config(num_layers=2)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"moe_router_topk": 2}, "moe_router_topk = 2"),
        ({"moe_shared_expert_intermediate_size": 16}, "moe_shared_expert_intermediate_size = 16"),
        ({"moe_router_num_groups": 8, "moe_router_group_topk": 4}, "moe_router_num_groups = 8"),
    ]
    for changes, named in refused:
        with pytest.raises(UpcycleError, match=named):
            Conversion.of(tiny_config(**SPARSE | changes), old, ExpertsSettings(), source="test")
    with pytest.raises(ValidationError, match="zero_out has none"):
        ExpertsSettings(init_experts="zero_out", routed_fraction=0.5)
    with pytest.raises(ValidationError, match="virtual_groups has none"):
        ExpertsSettings(noise=0.1)
