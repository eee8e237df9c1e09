"""Assignment: each parameter matches one rule; what the rules say of a model with every kind of parameter."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from toy_model import EXPERTS, ToyModel, toy_config

from megatron_vpmoe.config.schema_run import LrMultiplier, RuleDecay
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.optim import build_optimizer, build_scheduler
from megatron_vpmoe.optim.assignment import (
    RULES,
    Rule,
    assignment_table,
    find_rule,
    render_assignment_table,
    write_assignment_table,
)

LAYER = "decoder.layers.3."

EXPECTED = {
    "embedding.word_embeddings.weight": ("adamw", "decoupled_lr", True),
    "output_layer.weight": ("adamw", "decoupled_lr", True),
    "decoder.final_layernorm.weight": ("adamw", "normuon_aux_lr", False),
    LAYER + "input_layernorm.weight": ("adamw", "normuon_aux_lr", False),
    LAYER + "pre_mlp_layernorm.weight": ("adamw", "normuon_aux_lr", False),
    LAYER + "self_attention.linear_qkv.weight": ("normuon", "lr", True),
    LAYER + "self_attention.linear_qkv.bias": ("adamw", "normuon_aux_lr", False),
    LAYER + "self_attention.linear_tpa_a.weight": ("normuon", "lr", True),
    LAYER + "self_attention.linear_tpa_a.bias": ("adamw", "normuon_aux_lr", False),
    LAYER + "self_attention.linear_tpa_b.weight": ("normuon", "lr", True),
    LAYER + "self_attention.qkv_bias": ("adamw", "normuon_aux_lr", False),
    LAYER + "self_attention.linear_proj.weight": ("normuon", "lr", True),
    LAYER + "self_attention.q_layernorm.weight": ("adamw", "normuon_aux_lr", False),
    LAYER + "self_attention.sink": ("adamw", "normuon_aux_lr", False),
    LAYER + "self_attention.grape_log_freq": ("adamw", "normuon_aux_lr", False),
    LAYER + "self_attention.value_residual_scale": ("adamw", "normuon_aux_lr", False),
    LAYER + "mlp.linear_fc1.weight": ("normuon", "lr", True),
    LAYER + "mlp.router.weight": ("adamw", "router_lr", True),
    LAYER + "mlp.shared_experts.linear_fc2.weight": ("normuon", "lr", True),
    LAYER + "mlp.shared_experts.linear_fc2.bias": ("adamw", "normuon_aux_lr", False),
    LAYER + "mlp.experts.fc1_weight": ("normuon", "lr", True),
    LAYER + "mlp.experts.fc2_bias": ("adamw", "normuon_aux_lr", False),
    LAYER + "mlp.experts.local_experts.7.linear_fc1.weight": ("normuon", "lr", True),
    LAYER + "mlp.experts.local_experts.7.linear_fc1.bias": ("adamw", "normuon_aux_lr", False),
    LAYER + "mlp.experts.linear_fc1.weight7": ("normuon", "lr", True),
    LAYER + "mlp.experts.linear_fc1.bias7": ("adamw", "normuon_aux_lr", False),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rule_of_each_name(name: str) -> None:
    rule = find_rule(name)
    assert (rule.optimizer, rule.lr, rule.weight_decay) == EXPECTED[name]


@pytest.mark.parametrize("name", ["decoder.layers.0.mamba.in_proj.weight", "decoder.layers.0.self_attention.gate", "x"])
def test_an_unknown_parameter_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"parameter {name} is matched by no rule"):
        find_rule(name)


def test_a_parameter_with_two_rules_is_named_with_both() -> None:
    rules = (*RULES, Rule("second", ("*router*",), "adamw", "lr", True))
    with pytest.raises(ConfigError, match="several rules: router, second"):
        find_rule(LAYER + "mlp.router.weight", rules)


def test_table_of_the_toy_model() -> None:
    model = ToyModel()
    rows = assignment_table(model, toy_config())
    assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
    by_name = {row.name: row for row in rows}
    qkv = by_name["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert (qkv.matrices, qkv.lr, qkv.weight_decay, qkv.expert) == (3, 0.02, 0.1, False)
    experts = by_name["decoder.layers.0.mlp.experts.fc2_weight"]
    assert (experts.matrices, experts.expert) == (EXPERTS, True)
    assert by_name["output_layer.weight"].lr == 0.005
    assert by_name["decoder.layers.0.mlp.router.weight"].lr == 0.003
    sink = by_name["decoder.layers.0.self_attention.sink"]
    assert (sink.lr, sink.weight_decay, sink.matrices) == (0.01, 0.0, 0)


def test_multipliers_reach_the_groups_of_the_optimizer(single_process: None) -> None:
    multipliers = [
        LrMultiplier(pattern="*.0.mlp.experts.fc1_weight", factor=0.5),
        LrMultiplier(pattern="out*", factor=2),
    ]
    cfg, model = toy_config(lr_multipliers=multipliers), ToyModel()
    by_name = {row.name: row for row in assignment_table(model, cfg)}
    expected = {"decoder.layers.0.mlp.experts.fc1_weight": 0.01, "decoder.layers.1.mlp.experts.fc1_weight": 0.02}
    expected |= {"output_layer.weight": 0.01, "embedding.word_embeddings.weight": 0.005}
    optimizer = build_optimizer([model], cfg)
    build_scheduler(optimizer, cfg).step(2)
    for name, lr in expected.items():
        assert by_name[name].lr == pytest.approx(lr)
        (group,) = [g for g in optimizer.param_groups if any(p is model.get_parameter(name) for p in g["params"])]
        assert group["max_lr"] == pytest.approx(lr)
        assert group["lr"] == pytest.approx(lr, rel=0.1)


@pytest.mark.parametrize(
    ("patterns", "error"),
    [(["*.mamba.*"], "no parameter matches '\\*.mamba.\\*'"), (["out*", "*layer.weight"], "'out\\*' and by '\\*layer")],
)
def test_multipliers_that_reach_nothing_or_overlap_are_refused(patterns: list[str], error: str) -> None:
    multipliers = [LrMultiplier(pattern=pattern, factor=2.0) for pattern in patterns]
    with pytest.raises(ConfigError, match=error):
        assignment_table(ToyModel(), toy_config(lr_multipliers=multipliers))


def test_decay_of_a_rule(single_process: None) -> None:
    decays = [RuleDecay(rule="router", weight_decay=0.0), RuleDecay(rule="biases", weight_decay=0.5)]
    cfg, model = toy_config(weight_decays=decays, weight_decay=0.0), ToyModel()
    by_name = {row.name: row.weight_decay for row in assignment_table(model, cfg)}
    assert by_name["decoder.layers.0.mlp.router.weight"] == by_name["output_layer.weight"] == 0.0
    assert by_name["decoder.layers.0.self_attention.linear_proj.bias"] == 0.5
    optimizer = build_optimizer([model], cfg)
    build_scheduler(optimizer, cfg).step(1)
    bias = model.get_parameter("decoder.layers.0.self_attention.linear_proj.bias")
    (group,) = [g for g in optimizer.param_groups if any(p is bias for p in g["params"])]
    assert group["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("names", "error"), [(["mamba"], "matches no parameter"), (["router", "router"], "named twice")]
)
def test_decays_of_unknown_or_repeated_rules_are_refused(names: list[str], error: str) -> None:
    decays = [RuleDecay(rule=name, weight_decay=0.2) for name in names]
    with pytest.raises(ConfigError, match=error):
        assignment_table(ToyModel(), toy_config(weight_decays=decays))


def test_wrappers_prefixes_do_not_matter() -> None:
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module.module = ToyModel()
    assert assignment_table([wrapped], toy_config()) == assignment_table(wrapped.module.module, toy_config())


def test_frozen_parameters_are_listed_and_not_optimised(single_process: None) -> None:
    model = ToyModel()
    model.output_layer.weight.requires_grad_(False)
    rows = {row.name: row for row in assignment_table(model, toy_config())}
    assert (rows["output_layer.weight"].optimizer, rows["output_layer.weight"].lr) == ("frozen", 0.0)
    assert [row for row in rows.values() if row.optimizer == "frozen"] == [rows["output_layer.weight"]]
    optimizer = build_optimizer([model], toy_config())
    optimized = {id(param) for member in optimizer.members for param in member.model_params}
    assert id(model.output_layer.weight) not in optimized and len(optimized) == len(rows) - 1
    multiplier = [LrMultiplier(pattern="output_layer.weight", factor=2.0)]
    with pytest.raises(ConfigError, match="no parameter matches 'output_layer"):
        assignment_table(model, toy_config(lr_multipliers=multiplier))


def test_adam_takes_everything_at_the_same_learning_rates() -> None:
    model = ToyModel()
    normuon, adam = assignment_table(model, toy_config()), assignment_table(model, toy_config(optimizer="adam"))
    assert {row.optimizer for row in adam} == {"adamw"}
    assert [(row.lr, row.weight_decay) for row in adam] == [(row.lr, row.weight_decay) for row in normuon]


def test_a_vector_under_a_matrix_rule_is_refused() -> None:
    rules = (Rule("all", ("*",), "normuon", "lr", True),)
    with pytest.raises(ConfigError, match="weight has shape"):
        assignment_table(ToyModel().decoder, toy_config(), rules)


def test_rendering_and_json(tmp_path: Path) -> None:
    rows = assignment_table(ToyModel(), toy_config())
    console = Console(file=io.StringIO(), width=100)
    console.print(render_assignment_table(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "expert matrices" in text and "normuon" in text
    write_assignment_table(rows, tmp_path / "assignment.json")
    stored = json.loads((tmp_path / "assignment.json").read_text())
    assert [entry["name"] for entry in stored] == [row.name for row in rows]
    assert stored[0]["shape"] == [24, 16]
