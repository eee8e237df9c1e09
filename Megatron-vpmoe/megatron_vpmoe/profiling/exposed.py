"""Communication that nothing hides: of a trace, the time in collectives in which nothing is computed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
Interval = tuple[float, float]


class Communication(NamedTuple):
    """Milliseconds of a whole trace.

    Attributes:
        total: in which a collective is under way.
        exposed: of these, in which nothing is computed.
    """

    total: float
    exposed: float


def communication(events: Iterable[dict[str, Any]]) -> Communication:
    """Read it from the events of a Chrome trace of torch's profiler (``ts``, ``dur``: microseconds), of one process.

    On a GPU NCCL's kernels are held against all other work of the device. On a CPU gloo's collectives, each from the
    call that handed it to gloo's threads, are held against torch's operators on any thread.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    device = [event for event in whole if event.get("cat") in _ON_DEVICE]
    if device:
        collectives = _intervals(event for event in device if _is_nccl(event))
        computing = _intervals(event for event in device if not _is_nccl(event))
    else:
        operators = [event for event in whole if event.get("cat") == "cpu_op"]
        calls = sorted(event["ts"] for event in operators if event["name"].startswith("c10d::"))
        collectives = [
            (calls[at - 1] if (at := bisect_right(calls, begin)) else begin, end)
            for begin, end in _intervals(event for event in whole if event["name"].startswith("gloo:"))
        ]
        computing = _intervals(event for event in operators if event["name"].startswith("aten::"))
    busy, hidden = _merged(collectives), _merged(computing)
    total = sum(end - begin for begin, end in busy)
    return Communication(total / 1e3, (total - _shared(busy, hidden)) / 1e3)


def _is_nccl(event: dict[str, Any]) -> bool:
    return "nccl" in event["name"].lower()


def _intervals(events: Iterable[dict[str, Any]]) -> list[Interval]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events]


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union, in order and apart."""
    union: list[Interval] = []
    for begin, end in sorted(intervals):
        if union and begin <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((begin, end))
    return union


def _shared(left: Sequence[Interval], right: Sequence[Interval]) -> float:
    """Length of what two unions have in common."""
    length, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        length += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return length
