"""Buckets are sent in one order, each as soon as what this rank has of it is updated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_model import ToyModel

from megatron_vpmoe.optim.gathering import Gathering, own_pieces
from megatron_vpmoe.runtime.sharded_data_parallel import Piece, ShardedDataParallel


class Bucket:
    """One of so many parameters, of which this rank has a part of the first ``own``."""

    def __init__(self, count: int, own: int, sent: list[Bucket]) -> None:
        self.params = {torch.nn.Parameter(torch.zeros(1)) for _ in range(count)}
        self.pieces = [Piece(param, 0, 1) for param in list(self.params)[:own]]
        self._sent, self.waited = sent, 0

    def start_gather(self) -> None:
        self._sent.append(self)

    def finish_gather(self) -> None:
        self.waited += 1


@given(st.data())
def test_a_bucket_leaves_when_it_and_those_before_are_updated(data: Any) -> None:
    sent: list[Bucket] = []
    counts = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), max_size=5))
    buckets = [Bucket(count, min(count, own), sent) for count, own in counts]
    pieces = data.draw(st.permutations([piece for bucket in buckets for piece in bucket.pieces]))
    gathering = Gathering(cast(Any, buckets))
    for step in (1, 2):
        sent.clear()
        gathering.begin()
        gathering.updated([])
        for done in range(len(pieces) + 1):
            complete = [set(bucket.pieces) <= set(pieces[:done]) for bucket in buckets]
            assert sent == buckets[: complete.index(False) if False in complete else len(buckets)]
            if done < len(pieces):
                gathering.updated(pieces[done : done + 1])
        gathering.finish()
        assert [bucket.waited for bucket in buckets] == [step] * len(buckets)


def test_one_process_leaves_its_parameters_where_they_are(single_process: None) -> None:
    model = ToyModel()
    frozen = model.output_layer.weight.requires_grad_(False)
    before = {name: param.data_ptr() for name, param in model.named_parameters()}
    wrapped = ShardedDataParallel(model.config, model, overlap_grad_reduce=True)
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == before
    trained = {param for param in model.parameters() if param is not frozen}
    assert trained == {piece.param for bucket in wrapped.sharded_buckets for piece in bucket.pieces if piece.whole}
    assert all(param.requires_grad for param in trained) and not hasattr(frozen, "main_grad")


def test_several_ranks_need_slices() -> None:
    param = torch.nn.Parameter(torch.zeros(3, 2))
    alone, two = (cast(Any, SimpleNamespace(size=lambda n=n: n)) for n in (1, 2))
    assert own_pieces([param], [], alone) == [Piece(param, 0, 3)]
    with pytest.raises(ValueError, match="2 ranks share a model that is not wrapped"):
        own_pieces([param], [], two)
