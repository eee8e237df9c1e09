"""What a step took: milliseconds by range, and memory; looked at in the steps that are logged."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_vpmoe.metrics import MetricStream
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime.device import current_device
from megatron_vpmoe.runtime.memory import memory_in_use
from megatron_vpmoe.runtime.range_clock import RangeClock, UpstreamTimers
from megatron_vpmoe.runtime.ranges import annotated, listening

_STEP = "step"
_TOLD = ("forward", "backward", "communication", "optimizer")


class StepClock:
    """Splits the time of an update by range, without a wait: on a GPU by events, which are read when it has finished.

    Args:
        model: bare, whose schedule's timers are listened to.
    """

    def __init__(self, model: VPModel) -> None:
        self._config = model.config
        self._clock = RangeClock()

    @contextmanager
    def listening(self, due: bool) -> Iterator[None]:
        """Around an update: its ranges are timed where it is ``due``, and else cost nothing."""
        if not due:
            yield
            return
        self._clock = RangeClock((*_TOLD, _STEP), wait=False)
        self._config.timers = UpstreamTimers(self._clock)
        try:
            with listening(self._clock), annotated(_STEP):
                yield
        finally:
            self._config.timers = None

    def report(self, waiting: float) -> dict[str, float]:
        """Milliseconds of this rank in the last update that was due; the device has finished it.

        Args:
            waiting: seconds in which the step's batches were waited for before.
        """
        seconds = self._clock.seconds
        milliseconds = {name: 1e3 * seconds.get(name, 0.0) for name in _TOLD}
        milliseconds |= {"other": 1e3 * seconds.get(_STEP, 0.0), "data": 1e3 * waiting}
        return {f"ms/{name}": value for name, value in {**milliseconds, "step": sum(milliseconds.values())}.items()}


def memory_of_ranks() -> dict[str, float]:
    """GiB in use on the rank that has most of each kind; a collective of all ranks."""
    in_use = memory_in_use()
    most = torch.tensor(list(in_use.values()), dtype=torch.float64).to(current_device())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return {f"memory/{kind}_gib": value / 2**30 for kind, value in zip(in_use, most.tolist(), strict=True)}


@contextmanager
def timed(metrics: MetricStream, step: int, what: str) -> Iterator[None]:
    """Record the milliseconds that training stood still for, as ``ms/<what>``; not of what ends in an error."""
    began = time.perf_counter()
    yield
    metrics.log(step, {f"ms/{what}": 1e3 * (time.perf_counter() - began)})
