"""Communication that computation does not cover, read from traces: of a GPU, and of gloo's threads on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.profiling.exposed import communication

MS = 1000


def event(name: str, begin: int, end: int, cat: str) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": begin, "dur": end - begin, "cat": cat}


def test_of_a_gpu_only_kernels_count() -> None:
    trace = [
        event("ncclDevKernel_ReduceScatter_Sum_bf16", 0, 10 * MS, "kernel"),
        event("ncclDevKernel_AllGather", 5 * MS, 12 * MS, "kernel"),
        event("gemm", 2 * MS, 4 * MS, "kernel"),
        event("Memcpy DtoH", 11 * MS, 20 * MS, "gpu_memcpy"),
        event("aten::mm", 0, 12 * MS, "cpu_op"),  # the host is ahead
        {"ph": "i", "name": "mark", "ts": 3},
    ]
    assert communication(trace) == (12, 9)


def test_of_a_cpu_a_collective_lasts_from_its_call_to_the_end_of_gloo_s_work() -> None:
    trace = [
        event("c10d::allreduce_", 1 * MS, 1 * MS + 100, "cpu_op"),
        event("gloo:all_reduce", 3 * MS, 9 * MS, "user_annotation"),
        event("aten::mm", 4 * MS, 6 * MS, "cpu_op"),
        event("aten::add", 5 * MS, 7 * MS, "cpu_op"),
        event("step", 0, 20 * MS, "user_annotation"),
    ]
    assert communication(trace) == (8, 5)


def test_without_communication_there_is_none() -> None:
    assert communication([event("aten::mm", 0, MS, "cpu_op")]) == communication([]) == (0, 0)


@given(
    spans=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans()), max_size=12),
)
def test_the_same_as_counting_ticks(spans: list[tuple[int, int, bool]]) -> None:
    trace = [event("nccl" if sends else "gemm", begin, begin + length, "kernel") for begin, length, sends in spans]
    ticks = {
        kind: {tick for begin, length, sends in spans if sends is kind for tick in range(begin, begin + length)}
        for kind in (True, False)
    }
    found = communication(trace)
    assert found.total * MS == pytest.approx(len(ticks[True]))
    assert found.exposed * MS == pytest.approx(len(ticks[True] - ticks[False]))
