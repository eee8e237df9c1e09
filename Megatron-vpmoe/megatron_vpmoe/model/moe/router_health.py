"""Is the router using its experts? Numbers from the tokens per expert of a whole global batch, and thresholds on them.

Shapes: L layers with experts, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    - ``experts_active``, ``dead_experts``: experts with at least one token, and without any;
    - ``bias_range``: largest minus smallest expert bias.

    Over all layers: ``mean_cv_pct``, ``std_cv_pct`` (population), ``mean_entropy``, ``min_entropy``,
    ``mean_max_load_pct``, ``max_load_pct`` (of the worst layer), ``dead_experts_count`` (sum),
    ``experts_active_mean``, ``expert_bias_range`` (of the widest layer).

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


def check_thresholds(health: dict[str, float], cfg: RunConfig) -> list[str]:
    """Hold the router's health against ``logging.router_*``.

    Args:
        health: from ``router_health``; empty for a dense model.

    Returns:
        one line for each threshold at which to warn.

    Raises:
        VpmoeError: ``router_dead_experts_fail`` is reached.
    """
    if not health:
        return []
    limits, warnings = cfg.logging, []
    max_load, dead = health[AGGREGATE + "max_load_pct"], int(health[AGGREGATE + "dead_experts_count"])
    if limits.router_dead_experts_fail is not None and dead >= limits.router_dead_experts_fail:
        raise VpmoeError(
            f"{dead} experts got no token, the run was to end at {limits.router_dead_experts_fail}",
            source=AGGREGATE + "dead_experts_count; logging.router_dead_experts_fail",
            remedy="raise --moe-aux-loss-coeff or --moe-router-bias-update-rate, or lower --lr; "
            "--moe-per-layer-logging shows the layers",
        )
    if limits.router_dead_experts_warn is not None and dead >= limits.router_dead_experts_warn:
        warnings.append(f"router: {dead} experts got no token (warning from {limits.router_dead_experts_warn} on)")
    if limits.router_max_load_warn_pct is not None and max_load > limits.router_max_load_warn_pct:
        warnings.append(
            f"router: the busiest expert takes {max_load:.1f} % of its layer's tokens "
            f"(warning above {limits.router_max_load_warn_pct:g} %)"
        )
    return warnings
