"""Is the router using its experts? Numbers from the tokens per expert of a whole global batch, and thresholds on them.

Shapes: L layers with experts, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_vpmoe.errors import VpmoeError

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

AGGREGATE = "moe/router_agg/"
LAYER = "moe/router/layer_{}/"


def router_health(
    load_LE: Tensor,
    *,
    expert_bias_LE: Tensor | None = None,
    layer_numbers: Sequence[int] | None = None,
    per_layer: bool = False,
) -> dict[str, float]:
    """Metrics of load balance.

    Of each layer, with p the share of the layer's assignments (tokens times top-k) that each expert got:

    - ``cv_pct``: coefficient of variation of the loads, 100 * population std / mean; 0 is perfect balance;
    - ``entropy``: -sum p ln p in nats, not normalised; ln E is perfect balance, 0 is one expert;
    - ``max_load_pct``: 100 * max p; 100 / E is perfect balance;
    - ``max_vio``: maximal violation of balance, max load / mean load - 1; 0 is perfect balance (Wang et al. 2024,
      arXiv 2408.15664, who call it MaxVio);
    - ``experts_active``, ``dead_experts``: experts with at least one token, and without any;
    - ``bias_range``: largest minus smallest expert bias.

    Over all layers: ``mean_cv_pct``, ``std_cv_pct`` (population), ``mean_entropy``, ``min_entropy``,
    ``mean_max_load_pct``, ``max_load_pct`` (of the worst layer), ``mean_max_vio``, ``max_vio`` (of the worst layer),
    ``dead_experts_count`` (sum), ``experts_active_mean``, ``expert_bias_range`` (of the widest layer).

    Args:
        load_LE: tokens that each expert processed, any real dtype, summed over micro-batches and ranks.
        expert_bias_LE: the routers' expert biases; None leaves the bias metrics out.
        layer_numbers: global numbers of the L layers (from 1), for the tags of single layers.
        per_layer: also give the metrics of each layer.

    Returns:
        tag -> value.
    """
    load_LE = load_LE.double()
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp_min(1.0)
    layers = {
        "cv_pct": 100.0 * share_LE.std(dim=1, correction=0) / share_LE.mean(dim=1).clamp_min(1e-30),
        "entropy": torch.special.entr(share_LE).sum(dim=1),
        "max_load_pct": 100.0 * share_LE.amax(dim=1),
        "max_vio": share_LE.amax(dim=1) / share_LE.mean(dim=1).clamp_min(1e-30) - 1.0,
        "experts_active": (load_LE > 0).sum(dim=1).double(),
        "dead_experts": (load_LE <= 0).sum(dim=1).double(),
    }
    aggregate = {
        "mean_cv_pct": layers["cv_pct"].mean(),
        "std_cv_pct": layers["cv_pct"].std(correction=0),
        "mean_entropy": layers["entropy"].mean(),
        "min_entropy": layers["entropy"].min(),
        "mean_max_load_pct": layers["max_load_pct"].mean(),
        "max_load_pct": layers["max_load_pct"].max(),
        "mean_max_vio": layers["max_vio"].mean(),
        "max_vio": layers["max_vio"].max(),
        "dead_experts_count": layers["dead_experts"].sum(),
        "experts_active_mean": layers["experts_active"].mean(),
    }
    if expert_bias_LE is not None:
        layers["bias_range"] = (expert_bias_LE.amax(dim=1) - expert_bias_LE.amin(dim=1)).double()
        aggregate["expert_bias_range"] = layers["bias_range"].max()
    tags = {AGGREGATE + name: value.item() for name, value in aggregate.items()}
    if per_layer:
        numbers = layer_numbers if layer_numbers is not None else range(1, len(load_LE) + 1)
        for row, number in enumerate(numbers):
            tags |= {LAYER.format(number) + name: value[row].item() for name, value in layers.items()}
    return tags


@dataclass(frozen=True)
class Threshold:
    """A limit on one metric: ``logging.<field>``, of which "warn" and "fail" are two.

    ``text`` says what was found, with ``{value}`` and ``{limit}``. A count of dead experts is reached at its limit,
    every other metric has to exceed it.
    """

    tag: str
    field: str
    text: str
    reached_at_limit: bool = False

    def passed(self, value: float, limit: float | None) -> bool:
        """Whether ``value`` is out of bounds."""
        return limit is not None and (value >= limit if self.reached_at_limit else value > limit)


THRESHOLDS = (
    Threshold("dead_experts_count", "router_dead_experts_{}", "{value:.0f} experts got no token (limit {limit})", True),
    Threshold(
        "max_load_pct",
        "router_max_load_{}_pct",
        "the busiest expert takes {value:.1f} % of its layer's assignments (limit {limit:g} %)",
    ),
    Threshold(
        "mean_cv_pct",
        "router_cv_{}_pct",
        "the loads' coefficient of variation is {value:.1f} %, mean over layers (limit {limit:g} %)",
    ),
    Threshold(
        "max_vio",
        "router_max_vio_{}",
        "the busiest expert has {value:.2f} times the mean load too much, in the worst layer (limit {limit:g})",
    ),
)
"""Every metric that can warn or end a run."""


def check_thresholds(health: dict[str, float], cfg: RunConfig) -> list[str]:
    """Hold the router's health against the limits ``logging.router_*_warn*`` and ``logging.router_*_fail*``.

    Args:
        health: from ``router_health``; empty for a dense model.

    Returns:
        one line for each threshold at which to warn.

    Raises:
        VpmoeError: one at which to end the run is passed.
    """
    warnings = []
    for threshold in THRESHOLDS:
        value = health.get(AGGREGATE + threshold.tag)
        if value is None:
            continue
        fail_field, warn_field = (threshold.field.format(kind) for kind in ("fail", "warn"))
        fail, warn = (getattr(cfg.logging, field) for field in (fail_field, warn_field))
        if threshold.passed(value, fail):
            raise VpmoeError(
                f"router collapse: {threshold.text.format(value=value, limit=fail)}",
                source=f"{AGGREGATE}{threshold.tag} = {value:g}; logging.{fail_field} = {fail:g}",
                remedy="raise --moe-aux-loss-coeff or --moe-router-bias-update-rate, or lower --lr; "
                "--moe-per-layer-logging shows the layers",
            )
        if threshold.passed(value, warn):
            warnings.append(f"router: {threshold.text.format(value=value, limit=warn)}")
    return warnings
