"""Schedules: shape over the iterations, groups in proportion, and position after loading."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from toy_model import toy_config

from megatron_vpmoe.optim.schedules import IterationScheduler, build_scheduler


def groups() -> Any:
    """Stands for an optimizer: a NorMuon group at the peak, an AdamW one at half of it without decay."""
    return SimpleNamespace(
        param_groups=[{"max_lr": 0.02, "wd_mult": 0.1, "params": []}, {"max_lr": 0.01, "wd_mult": 0.0, "params": []}]
    )


def learning_rates(scheduler: IterationScheduler, iterations: int) -> list[float]:
    """Learning rate of the first group at each update."""
    rates = []
    for _ in range(iterations):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return rates


def test_warmup_starts_above_zero_and_reaches_the_peak_at_its_last_update() -> None:
    rates = learning_rates(build_scheduler(groups(), toy_config(lr_warmup_iters=4)), 5)
    assert rates[:4] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    assert rates[4] == pytest.approx(0.02)


def test_cosine_ends_at_the_floor() -> None:
    rates = learning_rates(build_scheduler(groups(), toy_config(lr_warmup_iters=0)), 30)
    assert rates[0] == pytest.approx(0.02)
    assert rates[10] == pytest.approx((0.02 + 0.002) / 2)
    assert rates[5] == pytest.approx(0.002 + 0.018 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[20:] == pytest.approx([0.002] * 10)


def test_linear_and_constant() -> None:
    linear = learning_rates(build_scheduler(groups(), toy_config(lr_warmup_iters=0, lr_decay_style="linear")), 21)
    assert linear == pytest.approx([0.02 - 0.018 * i / 20 for i in range(21)])
    constant = learning_rates(build_scheduler(groups(), toy_config(lr_warmup_iters=2, lr_decay_style="constant")), 30)
    assert constant == pytest.approx([0.01] + [0.02] * 29)


def test_wsd_is_flat_and_then_falls() -> None:
    cfg = toy_config(lr_decay_style="WSD", lr_wsd_decay_iters=5)
    rates = learning_rates(build_scheduler(groups(), cfg), 21)
    assert rates[2:16] == pytest.approx([0.02] * 14)
    assert rates[15:] == pytest.approx([0.02 - 0.018 * i / 5 for i in range(6)])


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "WSD"])
def test_groups_keep_their_ratio_and_their_decay(style: str) -> None:
    scheduler = build_scheduler(groups(), toy_config(lr_decay_style=style, lr_wsd_decay_iters=5))
    for _ in range(25):
        first, second = scheduler.optimizer.param_groups
        assert second["lr"] == pytest.approx(first["lr"] / 2)
        assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
        scheduler.step(1)


@pytest.mark.parametrize("position", [0, 1, 7])
def test_state_dict_restores_the_position(position: int) -> None:
    scheduler, resumed = build_scheduler(groups(), toy_config()), build_scheduler(groups(), toy_config())
    scheduler.step(position)
    resumed.step(3)  # loading sets the position, whatever happened before
    resumed.load_state_dict(scheduler.state_dict())
    assert learning_rates(resumed, 20) == learning_rates(scheduler, 20)


def test_the_configuration_of_the_loading_run_wins() -> None:
    saved = build_scheduler(groups(), toy_config())
    saved.step(6)
    longer = build_scheduler(groups(), toy_config(lr_decay_style="linear"))
    longer.load_state_dict(saved.state_dict())
    assert longer.num_steps == 6
    assert longer.lr_decay_style == "linear"
