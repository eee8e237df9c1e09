"""How ranks tell each other what each has found: on the thread that trains, or on one beside it.

Two threads must not use one process group: in which order they come to it differs from rank to rank. So a thread beside
has a group of its own, over the CPU also where the run's are over GPUs, whose collectives could wait for each other on
the device.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch.distributed as dist

from megatron_vpmoe.runtime import distributed

T = TypeVar("T")


class Exchange:
    """On the thread that trains, by the groups of the run."""

    def gather(self, value: T) -> list[T]:
        """What each data-parallel rank passes, in order, on every rank; a collective."""
        from megatron.core import parallel_state

        return _gathered(value, cast(dist.ProcessGroup, parallel_state.get_data_parallel_group()))

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """See ``distributed.from_rank_0``."""
        return distributed.from_rank_0(make)


class _Told(NamedTuple):
    """What a rank tells the others: a value, or why there is none and never will be."""

    value: Any
    failure: BaseException | None = None


class _ToldByAll(Exception):
    """A rank has failed, and every rank has been told."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__()
        self.failure = failure


class ExchangeAside(Exchange):
    """On one thread beside it, by a group of its own; every rank is data-parallel to every other.

    Made by all ranks at the same time. All that they tell each other is told in one way, so that a rank that fails can
    tell it in place of whatever the others wait for.

    Args:
        timeout_minutes: that a rank waits for the others.
    """

    def __init__(self, timeout_minutes: int) -> None:
        several, timeout = distributed.world_size() > 1, timedelta(minutes=timeout_minutes)
        group = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self._group = cast("dist.ProcessGroup | None", group)

    def gather(self, value: T) -> list[T]:
        """See ``Exchange``."""
        return [told.value for told in self._all(_Told(value))]

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """See ``Exchange``; of a failure the other ranks hear by ``together``."""
        return cast(T, self.gather(make() if distributed.rank() == 0 else None)[0])

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, which may call the other two; a collective.

        Raises:
            BaseException: on every rank what ``work`` raised on the first one that failed.
        """
        try:
            try:
                result = work()
            except _ToldByAll:
                raise
            except BaseException as failure:
                self._all(_Told(None, failure))
                raise AssertionError("unreachable: a failure is raised once it is told") from failure
            self.gather(None)
        except _ToldByAll as told:
            raise told.failure from told.failure.__cause__
        return result

    def _all(self, told: _Told) -> list[_Told]:
        every = [told]
        if self._group is not None:
            every = _gathered(told._replace(failure=distributed.portable(told.failure)), self._group)
            every[self._group.rank()] = told
        for one in every:
            if one.failure is not None:
                raise _ToldByAll(one.failure)
        return every


def _gathered(value: T, group: dist.ProcessGroup) -> list[T]:
    every: list[T] = [value] * group.size()
    if len(every) > 1:
        dist.all_gather_object(every, value, group=group)
    return every
