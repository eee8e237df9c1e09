"""Division of parameters over ranks: everything once, nothing twice, balanced to one unit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.optim.shares import ParameterGather, Units, divide, pieces_of_ranks

UNITS = st.lists(st.builds(Units, st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=12)


@settings(deadline=None)
@given(units=UNITS, ranks=st.integers(1, 9))
def test_every_unit_is_in_one_share_and_shares_are_balanced_to_one_unit(units: list[Units], ranks: int) -> None:
    shares = divide(units, ranks)
    loads = [0] * ranks
    for (count, cost), share in zip(units, shares, strict=True):
        assert [u for first, after in share for u in range(first, after)] == list(range(count))
        for rank, (first, after) in enumerate(share):
            loads[rank] += (after - first) * cost
    total = sum(count * cost for count, cost in units)
    assert sum(loads) == total
    assert max(loads) <= total / ranks + max(cost for _, cost in units)


@settings(deadline=None)
@given(units=UNITS, ranks=st.integers(1, 4))
def test_pieces_cover_the_parameters(units: list[Units], ranks: int) -> None:
    params = [torch.nn.Parameter(torch.zeros(count * 2, 3)) for count, _ in units]
    for share in pieces_of_ranks(params, units, ranks):
        for piece in share:
            piece.of(piece.param.data).add_(1)
    assert all(bool((param == 1).all()) for param in params)


def test_scalars_and_whole_parameters() -> None:
    params = [torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(4))]
    (share,) = pieces_of_ranks(params, [Units(1, 1), Units(1, 4)], 1)
    assert [piece.whole for piece in share] == [True, True]
    assert share[0].of(params[0]) is params[0]


@pytest.mark.parametrize("bucket_bytes", [4, 20, 1000])
def test_buckets_of_any_size_carry_every_byte(
    bucket_bytes: int, single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks played by one: what each would send is taken from models of their own."""
    torch.manual_seed(0)
    shapes = [(5, 3), (), (2, 4), (7,)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    units = [Units(5, 3), Units(1, 1), Units(2, 4), Units(1, 7)]
    ranks = [
        [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
        for _ in range(3)
    ]
    gathers, world = [], torch.distributed.group.WORLD
    assert world is not None
    for rank, params in enumerate(ranks):
        gather = ParameterGather(pieces_of_ranks(params, units, 3), world, bucket_bytes)
        gather._rank, gather._ranks = rank, 3
        gathers.append(gather)
    sent: list[list[torch.Tensor]] = [[], [], []]
    for rank, gather in enumerate(gathers):

        def record(received: torch.Tensor, own: torch.Tensor, group: object, rank: int = rank) -> None:
            sent[rank].append(own.clone())
            received.zero_()

        monkeypatch.setattr(torch.distributed, "all_gather_single", record)
        before = [p.detach().clone() for p in ranks[rank]]
        gather.run()
        with torch.no_grad():
            for param, value in zip(ranks[rank], before, strict=True):
                param.copy_(value)
    expected = [torch.empty_like(p) for p in ranks[0]]
    for rank, params in enumerate(ranks):
        for piece in pieces_of_ranks(params, units, 3)[rank]:
            index = next(i for i, p in enumerate(params) if p is piece.param)
            piece.of(expected[index].data).copy_(piece.of(piece.param.data))
    for gather, params in zip(gathers, ranks, strict=True):
        calls = iter(range(len(sent[0])))

        def deliver(received: torch.Tensor, own: torch.Tensor, group: object, calls: object = calls) -> None:
            call = next(calls)  # type: ignore[call-overload]
            received.copy_(torch.cat([messages[call] for messages in sent]))

        monkeypatch.setattr(torch.distributed, "all_gather_single", deliver)
        gather.run()
        assert all(torch.equal(param, value) for param, value in zip(params, expected, strict=True))
