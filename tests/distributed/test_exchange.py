"""What ranks tell each other on a thread beside the updates, failures too, while their main threads talk as well."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.workers import run_workers

pytestmark = pytest.mark.slow


class Unsendable(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def told_beside() -> list[Any]:
    """What a thread of this rank gets to know of the other's, while the main threads talk as well."""
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.runtime.exchange import ExchangeAside

    distributed.initialize(seed=1)
    exchange, rank, found = ExchangeAside(1), distributed.rank(), list[Any]()

    def work(before: BaseException | None, after: BaseException | None) -> Callable[[], list[int]]:
        def of_this_rank() -> list[int]:
            if before is not None and rank == 1:
                raise before
            told = exchange.gather(rank)
            if after is not None and rank == 1:
                raise after
            return [*told, exchange.from_rank_0(lambda: 7 + rank)]

        return of_this_rank

    with ThreadPoolExecutor(1) as thread:
        for failures in ((None, None), (KeyError("first"), None), (None, Unsendable("the", "last")), (None, None)):
            under_way = thread.submit(exchange.together, work(*failures))
            for _ in range(20):
                assert distributed.sum_over_ranks({"ranks": 1.0}) == {"ranks": 2.0}
            error = under_way.exception()
            found.append(under_way.result() if error is None else f"{type(error).__name__}: {error}")
    distributed.shutdown()
    return found


def test_a_rank_that_fails_beside_the_updates_tells_the_other(tmp_path: Path) -> None:
    here, there = run_workers(2, told_beside, folder=tmp_path)
    assert here == [[0, 1, 7], "KeyError: 'first'", "RuntimeError: Unsendable: the last", [0, 1, 7]]
    assert there == [[0, 1, 7], "KeyError: 'first'", "Unsendable: the last", [0, 1, 7]]
