"""What a person asks of a planned layout, in numbers, and the same for machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_vpmoe.config import RunConfig, config_hash
from megatron_vpmoe.planning.layouts import Plan, Planned
from megatron_vpmoe.planning.predict import SPLIT
from megatron_vpmoe.software import provenance

_WORDS = {
    "compute": "products",
    "memory": "moving bytes",
    "launches": "launches",
    "communication": "communication",
    "waiting": "stages that wait",
}


@dataclass(frozen=True)
class Figures:
    """Of one layout.

    Attributes:
        tokens_per_second_per_gpu: padding included.
        days: until the run's last step; None: this is no machine that a run would be planned for.
        cost: of those days at the given price; None: none was given.
        reason: why it is not the best; empty of the best.
    """

    tokens_per_second_per_gpu: float
    days: float
    cost: float | None
    reason: str


def figures(cfg: RunConfig, made: Plan, price: float | None) -> list[Figures]:
    """Of every layout, in order; ``price``: of one GPU for one hour."""
    found = []
    for each in made.layouts:
        seconds = each.prediction.step_seconds * cfg.training.train_iters
        cost = None if price is None else price * made.fleet.gpus * seconds / 3600
        rate = each.prediction.tokens_per_second / made.fleet.gpus
        found.append(Figures(rate, seconds / 86400, cost, reason(each, made.best)))
    return found


def reason(each: Planned, best: Planned | None) -> str:
    """Why a layout is not the best one."""
    if not each.fits:
        return f"does not fit: {each.memory / 2**30:,.1f} of {each.available / 2**30:,.1f} GiB"
    if best is None or each is best:
        return ""
    more = {key: each.prediction.split[key] - best.prediction.split[key] for key in SPLIT}
    slower = each.prediction.step_seconds - best.prediction.step_seconds
    most = max(more, key=lambda key: more[key])
    percent = 100 * slower / best.prediction.step_seconds
    return f"+{percent:.0f} %: {1e3 * more[most]:+,.0f} ms of {_WORDS[most]}"


def plan_json(cfg: RunConfig, config: str, plans: list[Plan], numbers: list[list[Figures]]) -> dict[str, Any]:
    """``layouts`` has those of all fleets: first what fits, by step time."""
    layouts: list[tuple[tuple[bool, float], dict[str, Any]]] = []
    for made, of_plan in zip(plans, numbers, strict=True):
        for each, figure in zip(made.layouts, of_plan, strict=True):
            prediction = each.prediction
            entry = {
                "gpus": str(made.fleet),
                "layout": {"data_parallel_size": each.gpus["DP"], **each.layout.given},
                "fits": each.fits,
                "as_configured": each.as_configured,
                "step_seconds": prediction.step_seconds,
                "seconds": prediction.split,
                "device_seconds": prediction.parts,
                "mfu_pct": prediction.mfu_pct,
                "tokens_per_second_per_gpu": figure.tokens_per_second_per_gpu,
                "memory_gib": each.memory / 2**30,
                "days": figure.days,
                "cost": figure.cost,
                "reason": figure.reason,
                "flags": each.layout.flags(),
            }
            layouts.append(((not each.fits, prediction.step_seconds), entry))
    machines = {made.fleet.machine.name: made.fleet.machine for made in plans}
    return {
        "kind": "vpmoe plan",
        "provenance": provenance(config_hash=config_hash(cfg)),
        "config": config,
        "run_name": cfg.training.run_name,
        "tokens_per_step": cfg.training.global_batch_size * cfg.data.seq_length,
        "train_iters": cfg.training.train_iters,
        "machines": {name: machine.model_dump(mode="json", exclude={"match"}) for name, machine in machines.items()},
        "refused": {str(made.fleet): made.refused for made in plans},
        "layouts": [entry for _, entry in sorted(layouts, key=lambda pair: pair[0])],
    }
