"""The grid of all architectures: each combination builds and learns, or is refused by a message that names its fields.

The full product is walked where it costs microseconds, on the rules. Models are built, run and differentiated for a
selection in which every three values that the rules allow together occur together.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_vpmoe.config import RunConfig, parameter_count
from megatron_vpmoe.config.rule import Rule, View
from megatron_vpmoe.config.rules import ARCHITECTURE, find_problems
from megatron_vpmoe.config.schema import fields
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.optim.assignment import assignment_table
from tests.tiny import random_batch, tiny_config

POSITIONS = ("grape_m", "grape_a", "rope", "none")
SWITCH = (False, True)

# Each axis is a name and its values; a value sets one field or several.
AXES: dict[str, tuple[dict[str, Any], ...]] = {
    "schedule": (
        {"window_size": None, "window_attn_skip_freq": 2},
        {"window_size": 4, "window_attn_skip_freq": 1},
        {"window_size": 4, "window_attn_skip_freq": 2},
        {"window_size": 4, "window_attn_skip_freq": 9},
    ),
    "local positions": tuple({"local_position_embedding": kind} for kind in POSITIONS),
    "global positions": tuple({"global_position_embedding": kind} for kind in POSITIONS),
    "projections": (
        {"tpa": False},
        {"tpa": True, "tpa_rank": 2, "tpa_q_rank": 4, "tpa_factor_bias": True},
        {"tpa": True, "tpa_rank": 1, "tpa_q_rank": 3, "tpa_factor_bias": False},
    ),
    "softmax": ({"softmax_type": "learnable"}, {"softmax_type": "vanilla"}),
    "value residual": tuple({"value_residual": on} for on in SWITCH),
    "activation": ({"activation": "squared_relu"}, {"activation": "swiglu"}),
    "linear biases": tuple({"add_bias_linear": on} for on in SWITCH),
    "QKV biases": tuple({"add_qkv_bias": on} for on in SWITCH),
    "QK-norm": tuple({"qk_layernorm": on} for on in SWITCH),
    "embeddings": tuple({"untie_embeddings_and_output_weights": on} for on in SWITCH),
    "experts": (
        {"num_experts": None},
        {"num_experts": 8, "first_dense_layers": 1},
        {"num_experts": 8, "first_dense_layers": 0},
    ),
    "layers": ({"num_layers": 1}, {"num_layers": 3}),
    "backend": tuple({"attention_backend": name} for name in ("auto", "reference", "sdpa")),
}
ROUTING: dict[str, tuple[dict[str, Any], ...]] = {
    "groups": (
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_num_groups": None, "moe_router_group_topk": None},
        {"moe_router_num_groups": 4, "moe_router_group_topk": None},
        {"moe_router_num_groups": 3, "moe_router_group_topk": 1},
        {"moe_router_num_groups": 2, "moe_router_group_topk": 4},
        {"moe_router_num_groups": 8, "moe_router_group_topk": 1},
    ),
    "top-k": tuple({"moe_router_topk": k} for k in (1, 2, 3, 9)),
    "scores": ({"moe_router_score_function": "sigmoid"}, {"moe_router_score_function": "softmax"}),
    "expert bias": tuple({"moe_router_enable_expert_bias": on} for on in SWITCH),
    "balance loss": tuple({"moe_router_load_balancing_type": kind} for kind in ("seq_aux_loss", "none")),
    "shared expert": tuple({"moe_shared_expert_intermediate_size": width} for width in (48, None)),
    "logits": tuple({"moe_router_dtype": dtype} for dtype in ("fp32", None)),
    "activation": ({"activation": "squared_relu"}, {"activation": "swiglu"}),
    "linear biases": tuple({"add_bias_linear": on} for on in SWITCH),
}
GRIDS = {"architecture": AXES, "routing": ROUTING}
TOGETHER = 3
"""How many values at a time are all tried together in built models."""

Axes = dict[str, tuple[dict[str, Any], ...]]
Row = tuple[int, ...]
"""One combination: the index of the value that each axis has."""


def base_config() -> RunConfig:
    # At the usual init_method_std of 0.02 a squared ReLU this small leaves gradients that round to nothing.
    return tiny_config(num_layers=3, window_size=4, window_attn_skip_freq=2, seq_length=16, init_method_std=0.2)


BASE = base_config()


def changed(cfg: RunConfig, values: dict[str, Any]) -> RunConfig:
    """``cfg`` with some fields replaced, before any rule between fields."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        sections.setdefault(fields()[name].section, {})[name] = value
    return cfg.model_copy(
        update={section: getattr(cfg, section).model_copy(update=update) for section, update in sections.items()}
    )


def config_of(axes: Axes, row: Row) -> RunConfig:
    values = {name: value for axis, i in zip(axes.values(), row, strict=True) for name, value in axis[i].items()}
    return changed(BASE, values)


def refusals(cfg: RunConfig) -> list[Rule]:
    view = View(cfg)
    return [refusal for refusal in ARCHITECTURE if refusal.when(view)]


def is_read(axis: tuple[dict[str, Any], ...]) -> bool:
    """Whether any refusal names a field of the axis; those of other kinds of layers are not met on these grids."""
    met = [refusal for refusal in ARCHITECTURE if "layer_type" not in refusal.names]
    return any(name in refusal.names for refusal in met for value in axis for name in value)


def core_rows(axes: Axes) -> Iterator[Row]:
    """The full product of the axes that refusals read; the others stay at their first value."""
    yield from itertools.product(*(range(len(axis)) if is_read(axis) else (0,) for axis in axes.values()))


@pytest.fixture(scope="module")
def core(request: pytest.FixtureRequest) -> dict[Row, list[Rule]]:
    axes = GRIDS[request.param]
    return {row: refusals(config_of(axes, row)) for row in core_rows(axes)}


def random_row(axes: Axes, generator: random.Random) -> Row:
    return tuple(generator.randrange(len(axis)) for axis in axes.values())


Choice = tuple[tuple[int, int], ...]
"""Some axes of a row, each with the index of its value."""


def choices_of(row: Row, together: int) -> set[Choice]:
    return set(itertools.combinations(enumerate(row), together))


def covering_rows(axes: Axes, accepted: list[Row], together: int) -> tuple[list[Row], set[Choice]]:
    """Few accepted rows with every choice of ``together`` values that any accepted row has, and those that none has.

    Greedy. ``accepted`` are core rows; axes that no refusal reads are free.
    """
    generator = random.Random(0)
    sizes = [range(len(axis)) for axis in axes.values()]
    free = [not is_read(axis) for axis in axes.values()]
    rows: list[Row] = []
    never: set[Choice] = set()
    missing = {
        tuple(zip(chosen, values, strict=True))
        for chosen in itertools.combinations(range(len(sizes)), together)
        for values in itertools.product(*(sizes[axis] for axis in chosen))
    }
    for wanted in sorted(missing):
        if wanted not in missing:
            continue
        fitting = [row for row in accepted if all(free[i] or row[i] == v for i, v in wanted)]
        if not fitting:
            never.add(wanted)
            continue
        given = dict(wanted)
        candidates = [
            tuple(
                given.get(i, generator.choice(sizes[i])) if free[i] else value
                for i, value in enumerate(generator.choice(fitting))
            )
            for _ in range(30)
        ]
        best = max(candidates, key=lambda row: len(missing & choices_of(row, together)))
        rows.append(best)
        missing -= choices_of(best, together)
    return rows, never


@pytest.mark.slow
@pytest.mark.parametrize("core", GRIDS, indirect=True)
def test_a_refusal_names_the_fields_that_decide(core: dict[Row, list[Rule]], request: pytest.FixtureRequest) -> None:
    """Whatever the rest is: with the named fields at values that go together, the refusal is gone."""
    axes = GRIDS[request.node.callspec.params["core"]]
    assert any(core.values()) and not all(core.values())
    refused: dict[Rule, list[Row]] = {}
    for row, found in core.items():
        for refusal in found:
            refused.setdefault(refusal, []).append(row)
    generator = random.Random(2)
    for refusal, rows in refused.items():
        original = {name: getattr(getattr(BASE, fields()[name].section), name) for name in refusal.names}
        for row in generator.sample(rows, min(len(rows), 200)):
            cfg = config_of(axes, row)
            assert not refusal.when(View(changed(cfg, original))), (refusal.names, cfg.model, cfg.moe)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_a_refusal_reads_no_other_axis(grid: str) -> None:
    """Which is why the product of the axes that refusals name is the full product."""
    axes, generator = GRIDS[grid], random.Random(1)
    for _ in range(1000):
        row = random_row(axes, generator)
        plain = tuple(i if is_read(axis) else 0 for i, axis in zip(row, axes.values(), strict=True))
        assert refusals(config_of(axes, row)) == refusals(config_of(axes, plain))


def run(cfg: RunConfig) -> tuple[VPModel, float]:
    """Build, one forward and backward pass; the model with its gradients, and the loss."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = random_batch(2, cfg.data.seq_length, cfg.model.padded_vocab_size, seed=0)
    output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    even = torch.full(batch.labels.shape, 1.0 / int(batch.loss_mask.sum()))
    loss, _ = output.cross_entropy(batch.labels, batch.loss_mask, even)
    loss.backward()
    return model, loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("core", GRIDS, indirect=True)
def test_what_is_accepted_learns_and_what_is_not_has_a_reason(
    core: dict[Row, list[Rule]], request: pytest.FixtureRequest, single_process: None
) -> None:
    axes = GRIDS[request.node.callspec.params["core"]]
    rows, never = covering_rows(axes, [row for row, found in core.items() if not found], TOGETHER)
    assert len(rows) > 20
    for choice in never:  # no combination has these values, so refusals read some of their fields
        read = [(k, v) for k, v in choice if is_read(list(axes.values())[k])]
        names = {name for k, v in choice for name in list(axes.values())[k][v]}
        found = [found for row, found in core.items() if all(row[k] == v for k, v in read)]
        assert found and all(found), names
        assert any(names & set(refusal.names) for refusals_found in found for refusal in refusals_found), names
    for row in rows:
        cfg = config_of(axes, row)
        assert find_problems(cfg) == []
        model, loss = run(cfg)
        assert math.isfinite(loss), cfg.model
        assert parameter_count(cfg).total == sum(p.numel() for p in model.parameters()), cfg.model
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (name, cfg.model, cfg.moe)
            assert torch.isfinite(parameter.grad).all(), (name, cfg.model, cfg.moe)
            assert parameter.grad.any(), f"{name} never learns: {cfg.model} {cfg.moe}"
        assert len(assignment_table(model, cfg)) == len(list(model.parameters()))  # each with its one optimizer


@pytest.mark.slow
@pytest.mark.parametrize("core", ["architecture"], indirect=True)
def test_the_parts_are_those_that_were_asked_for(core: dict[Row, list[Rule]], single_process: None) -> None:
    """Each layer has the parameters of its parts, by name, and no others: a switch is not ignored."""
    rows, _ = covering_rows(AXES, [row for row, found in core.items() if not found], 2)
    for row in rows:
        cfg = config_of(AXES, row)
        model = build_model(cfg, device=torch.device("meta"))
        assert (model.output_layer.weight is None) == (not cfg.model.untie_embeddings_and_output_weights)
        for number, layer in enumerate(model.decoder.layers, start=1):
            parts = layer.get_submodule("self_attention").named_parameters()
            attention = {name.removesuffix(".weight") for name, _ in parts}
            assert attention == expected_attention(cfg, number), (number, cfg.model)
            assert ("mlp.experts.fc1_weight" in dict(layer.named_parameters())) == cfg.is_moe_layer(number)


def expected_attention(cfg: RunConfig, number: int) -> set[str]:
    """Names of one layer's attention parameters, from the fields alone."""
    m = cfg.model
    local = m.window_size is not None and number % m.window_attn_skip_freq != 0
    kind = m.local_position_embedding if local else m.global_position_embedding
    wanted = {"linear_proj": True, "linear_proj.bias": m.add_bias_linear}
    wanted |= {"q_layernorm": m.qk_layernorm, "k_layernorm": m.qk_layernorm}
    wanted |= {"sink": m.softmax_type == "learnable", "grape_log_freq": kind == "grape_m"}
    wanted |= {"value_residual_scale": m.value_residual and number > 1}
    if m.tpa and local:
        wanted |= {"linear_tpa_a": True, "linear_tpa_b": True, "qkv_bias": m.add_qkv_bias}
        wanted |= {"linear_tpa_a.bias": m.tpa_factor_bias}
    else:
        wanted |= {"linear_qkv": True, "linear_qkv.bias": m.add_qkv_bias}
    return {name for name, present in wanted.items() if present}
