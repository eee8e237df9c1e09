"""Layouts: what the rules admit and nothing else, by speed, with the memory of the house's estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vpmoe.config import load_config, memory_estimate
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.planning.layouts import Layout, Plan, plan
from megatron_vpmoe.runtime.machines import fleet

ROWS = ["--num-layers=8", "--global-batch-size=32"]
SHORT = [*ROWS, "--micro-batch-size=4"]


@pytest.fixture(scope="module")
def path(repository: Path) -> Path:
    return repository / "configs" / "vpmoe_stage1.yaml"


@pytest.fixture(scope="module")
def short(path: Path) -> Plan:
    """A plan of 8 layers on one node."""
    return plan(load_config(path, SHORT), fleet("8xH100"))


def test_every_layout_is_a_run_that_loads(path: Path, short: Plan) -> None:
    assert len(short.layouts) > 50
    for each in short.layouts[::17]:
        cfg = load_config(path, [*ROWS, *each.layout.flags()], nodes=1)
        assert each.layout.applied(load_config(path, SHORT)) == cfg
        assert each.memory == memory_estimate(cfg).total
        assert each.gpus["DP"] * each.gpus["TP"] * each.gpus["PP"] == 8


def test_every_kind_is_tried(short: Plan) -> None:
    seen = [(each.gpus, each.layout.given["recompute_granularity"]) for each in short.layouts]
    assert {gpus["EP"] for gpus, _ in seen} == {1, 2, 4, 8}
    assert {gpus["TP"] for gpus, _ in seen} == {1, 2}, "two key-value heads"
    assert {gpus["PP"] for gpus, _ in seen} == {1, 2, 4}, "a first stage of one dense layer has no experts"
    assert {way for _, way in seen} == {None, "selective", "full"}


def test_the_fastest_are_tried_compiled(short: Plan) -> None:
    best = short.best
    assert best is not None and best.layout.given["compile"] == "step" and str(best).endswith(", step")
    plain = {each.layout: each for each in short.layouts if each.layout.given["compile"] == "off"}
    compiled = [each for each in short.layouts if each.layout.given["compile"] != "off"]
    assert {each.layout.given["compile"] for each in compiled} == {"layers", "step"}
    for each in compiled:
        alike = plain[Layout.of(each.layout.given | {"compile": "off"})]
        assert each.prediction.step_seconds < alike.prediction.step_seconds and each.memory == alike.memory


def test_what_is_refused_is_refused_by_the_rules(path: Path, short: Plan) -> None:
    assert short.refused
    with pytest.raises(ConfigError) as refused:
        load_config(path, [*SHORT, "--tensor-model-parallel-size=4", "--sequence-parallel"], nodes=1)
    assert any(text in str(refused.value) for text in short.refused)


def test_the_fastest_that_fits_comes_first(short: Plan) -> None:
    fitting = [each.prediction.step_seconds for each in short.layouts if each.fits]
    assert fitting == sorted(fitting)
    assert [each.fits for each in short.layouts] == sorted((each.fits for each in short.layouts), reverse=True)
    assert short.best is short.layouts[0]
    assert sum(each.as_configured for each in short.layouts) == 1


def test_a_layout_is_there_once(short: Plan) -> None:
    assert len({each.layout for each in short.layouts}) == len(short.layouts)


def test_more_gpus_take_no_more_memory_of_each(path: Path, short: Plan) -> None:
    """At the same sizes of parallelism: what is not shared among more stays."""
    twice = plan(
        load_config(path, ["--num-layers=8", "--global-batch-size=64", "--micro-batch-size=4"]), fleet("16xH100")
    )
    larger = {each.layout: each for each in twice.layouts}
    pairs = [(each, larger[each.layout]) for each in short.layouts if each.layout in larger]
    assert pairs
    assert all(more.memory <= each.memory for each, more in pairs)
    # As long but for the update, which more ranks share.
    for made in pairs:
        each, more = (of.prediction.step_seconds - of.prediction.parts["optimizer"] for of in made)
        assert more >= 0.99 * each


@pytest.mark.slow
def test_full_scale_holds_all_experts_on_each_gpu(path: Path) -> None:
    made = plan(load_config(path), fleet("8xH100"))
    assert made.best is not None
    assert made.best.gpus == {"DP": 8, "EP": 1, "TP": 1, "PP": 1}
