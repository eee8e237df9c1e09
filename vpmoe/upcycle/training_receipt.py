"""What a receipt tells of a training, read off the run's metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.metrics import Record
from megatron_vpmoe.model.moe.router_health import AGGREGATE
from vpmoe.errors import UpcycleError

WATCHED_STEPS = 50
"""Steps at the beginning and at the end whose router health is reported."""
_ROUTER_TAGS = (AGGREGATE, "moe/seq_aux_loss")


def training_report(records: Sequence[Record], cfg: RunConfig, *, skipped_steps: int, source: str) -> dict[str, Any]:
    """Length and speed of a finished run.

    Returns:
        ``objective``, ``steps``, ``rows`` (of ``seq_length`` positions; answers where the model samples them),
        ``tokens`` (real ones; the mean of the logged steps times the steps, so exact where every step is logged),
        ``logged_steps``, ``tokens_per_second`` (median), ``training_seconds`` (``tokens`` at that speed; validation and
        saving not counted), ``loss_first`` and ``loss_last`` (of the training batches), ``skipped_steps``.

    Raises:
        UpcycleError: no step is on record.
    """
    steps = cfg.training.train_iters
    tokens = _values(records, "tokens/real")
    losses = _values(records, "loss/total")
    speeds = _values(records, "throughput/tokens_per_second")
    if not (tokens and losses and speeds):
        raise UpcycleError(
            "the training is at its end, and no step of it is on record",
            source=source,
            remedy="restore the file from a copy, or train again (--overwrite)",
        )
    speed = median(speeds)
    total = fmean(tokens) * steps
    return {
        "objective": cfg.training.objective,
        "steps": steps,
        "rows": steps * cfg.training.global_batch_size,
        "tokens": round(total),
        "logged_steps": len(tokens),
        "tokens_per_second": round(speed, 1),
        "training_seconds": round(total / speed, 1),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "skipped_steps": skipped_steps,
    }


def validation_report(records: Iterable[Record], last: int, *, source: str) -> dict[str, dict[str, float]]:
    """Every validation metric before the first and after the last step, by its tag (``valid/loss/total``).

    Raises:
        UpcycleError: one of the two is missing, or a loss is not finite.
    """
    found: dict[str, dict[str, float]] = {}
    for step, tag, value in records:
        if tag.startswith("valid/") and step in (0, last):
            found.setdefault(tag, {})["after" if step == last else "before"] = value
    faults = [tag for tag, pair in found.items() if len(pair) < 2]
    faults += [tag for tag, pair in found.items() if "/loss/" in tag and not all(map(math.isfinite, pair.values()))]
    if faults or not found:
        raise UpcycleError(
            f"no finite validation before and after the training: {', '.join(faults) or 'none was recorded'}",
            source=f"{source}: metrics.jsonl",
            remedy="look at the run's metrics; a lower learning rate if the loss is not finite",
        )
    return found


def router_report(records: Sequence[Record], last: int) -> dict[str, dict[str, Any]]:
    """Router health over the first and over the last ``WATCHED_STEPS`` steps: the logged ones of them.

    Returns:
        ``first_steps`` and ``last_steps``: ``steps`` (which) and, by the tag in metrics.jsonl, ``first``, ``last``,
        ``mean``, ``min`` and ``max`` over them.
    """
    routers = [record for record in records if record.tag.startswith(_ROUTER_TAGS)]
    return {
        "first_steps": _window(routers, 0, WATCHED_STEPS),
        "last_steps": _window(routers, last - WATCHED_STEPS, last),
    }


def _window(records: Sequence[Record], after: int, until: int) -> dict[str, Any]:
    inside = [record for record in records if after < record.step <= until]
    result: dict[str, Any] = {"steps": sorted({record.step for record in inside})}
    for tag in dict.fromkeys(record.tag for record in inside):
        values = _values(inside, tag)
        result[tag] = {
            "first": values[0],
            "last": values[-1],
            "mean": fmean(values),
            "min": min(values),
            "max": max(values),
        }
    return result


def _values(records: Iterable[Record], tag: str) -> list[float]:
    return [record.value for record in records if record.tag == tag]
