"""Router health: the figures of known load patterns, and the thresholds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.errors import ConfigError, VpmoeError
from megatron_vpmoe.model.moe.router_health import check_thresholds, router_health
from tests.tiny import tiny_config

AGGREGATE = "moe/router_agg/"


def aggregate(load: list[list[float]], **arguments) -> dict[str, float]:
    tags = router_health(torch.tensor(load), **arguments)
    return {tag.removeprefix(AGGREGATE): value for tag, value in tags.items() if tag.startswith(AGGREGATE)}


def test_perfect_balance():
    values = aggregate([[5, 5, 5, 5], [9, 9, 9, 9]])
    assert values == pytest.approx(
        {
            "mean_cv_pct": 0.0,
            "std_cv_pct": 0.0,
            "mean_entropy": math.log(4),
            "min_entropy": math.log(4),
            "mean_max_load_pct": 25.0,
            "max_load_pct": 25.0,
            "mean_max_vio": 0.0,
            "max_vio": 0.0,
            "dead_experts_count": 0.0,
            "experts_active_mean": 4.0,
        }
    )


def test_collapse_of_one_layer_shows():
    values = aggregate([[8, 0, 0, 0], [2, 2, 2, 2]])
    assert values["mean_cv_pct"] == pytest.approx(100 * math.sqrt(3) / 2)
    assert values["std_cv_pct"] == pytest.approx(100 * math.sqrt(3) / 2)
    assert values["min_entropy"] == 0.0 and values["mean_entropy"] == pytest.approx(math.log(4) / 2)
    assert values["mean_max_load_pct"] == 62.5 and values["max_load_pct"] == 100.0
    assert values["max_vio"] == pytest.approx(3.0) and values["mean_max_vio"] == pytest.approx(1.5)
    assert values["dead_experts_count"] == 3.0 and values["experts_active_mean"] == 2.5


def test_expert_bias_range_is_of_the_widest_layer():
    bias = torch.tensor([[0.1, -0.1, 0.0], [0.5, 0.2, 0.3]])
    assert aggregate([[1, 1, 1], [1, 1, 1]], expert_bias_LE=bias)["expert_bias_range"] == pytest.approx(0.3)
    assert "expert_bias_range" not in aggregate([[1, 1, 1]])


def test_single_layers_carry_their_global_numbers():
    load, bias = torch.tensor([[4, 0], [1, 3]]), torch.tensor([[0.0, 1.0], [0.0, 0.25]])
    tags = router_health(load, expert_bias_LE=bias, layer_numbers=[2, 7], per_layer=True)
    layer = {tag: value for tag, value in tags.items() if not tag.startswith(AGGREGATE)}
    names = {"cv_pct", "entropy", "max_load_pct", "max_vio", "experts_active", "dead_experts", "bias_range"}
    assert set(layer) == {f"moe/router/layer_{number}/{name}" for number in (2, 7) for name in names}
    assert layer["moe/router/layer_2/dead_experts"] == 1.0
    assert layer["moe/router/layer_7/max_load_pct"] == 75.0
    assert layer["moe/router/layer_7/bias_range"] == 0.25
    assert not any(tag.startswith("moe/router/") for tag in router_health(load))


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=40), st.integers(2, 50))
def test_only_the_shares_count(loads, factor):
    once, scaled = aggregate([loads]), aggregate([[factor * load for load in loads]])
    assert once == pytest.approx(scaled, rel=1e-6, abs=1e-6)
    assert 0 <= once["mean_entropy"] <= math.log(len(loads)) + 1e-9
    assert once["dead_experts_count"] + once["experts_active_mean"] == len(loads)


QUIET = {
    f"router_{name.format(kind)}": None
    for name in ("dead_experts_{}", "max_load_{}_pct", "cv_{}_pct", "max_vio_{}")
    for kind in ("warn", "fail")
} | {"moe_router_topk": 1, "moe_router_group_topk": 1}


@pytest.mark.parametrize(
    ("field", "quiet_at", "fires_at", "message"),
    [
        ("router_dead_experts_{}", 3, 2, "2 experts got no token"),
        ("router_max_load_{}_pct", 75.0, 74.0, "the busiest expert takes 75.0 %"),
        ("router_cv_{}_pct", 61.3, 61.2, "coefficient of variation is 61.2 %"),
        ("router_max_vio_{}", 2.0, 1.9, "2.00 times the mean load too much"),
    ],
)
def test_thresholds_warn_and_fail(field, quiet_at, fires_at, message):
    """Each at its limit and just past it; nothing of the other metrics speaks up."""
    load = torch.tensor([[6, 0, 0, 2], [2, 2, 2, 2]])
    health = router_health(load)
    assert check_thresholds(health, tiny_config(**QUIET)) == []
    warn, fail = field.format("warn"), field.format("fail")
    assert check_thresholds(health, tiny_config(**{**QUIET, warn: quiet_at, fail: quiet_at})) == []
    (warning,) = check_thresholds(health, tiny_config(**{**QUIET, warn: fires_at}))
    assert message in warning
    with pytest.raises(VpmoeError, match=message) as caught:
        check_thresholds(health, tiny_config(**{**QUIET, fail: fires_at}))
    assert fail in str(caught.value)
    assert check_thresholds({}, tiny_config(**{**QUIET, fail: fires_at})) == []


@pytest.mark.parametrize("name", ["max_load_{}_pct", "cv_{}_pct", "max_vio_{}"])
def test_failing_before_warning_is_refused(name):
    warn, fail = (f"router_{name.format(kind)}" for kind in ("warn", "fail"))
    with pytest.raises(ConfigError, match=r"fails at 1\.0, warns at 2\.0"):
        tiny_config(**{warn: 2.0, fail: 1.0})
