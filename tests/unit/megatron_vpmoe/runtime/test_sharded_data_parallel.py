"""Buckets are sent in one order, dense ones and experts, whatever the order in which their gradients come."""

from __future__ import annotations

import random
from itertools import pairwise
from unittest import mock

import pytest
import torch

from megatron_vpmoe.config import buffers
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.runtime.sharded_data_parallel import BucketGroup, ShardedDataParallel
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


def test_one_order_of_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bucket once and none before another that comes first, also where gradients are missing."""
    model = build_model(tiny_config(bf16=True, num_layers=8))
    with mock.patch.dict(buffers.BUCKET_BYTES, cpu=2**13):
        wrapped = ShardedDataParallel(model.config, model, overlap_grad_reduce=True)
    place = {param: number for number, param in enumerate(model.parameters())}
    first = [min(place[param] for param in bucket.params) for bucket in wrapped.sharded_buckets]
    assert first == sorted(first, reverse=True)
    kinds = [bucket in wrapped.expert_parallel_bucket_groups for bucket in wrapped.sharded_buckets]
    assert sum(1 for one, other in pairwise(kinds) if one != other) > 2, "they alternate"

    sent: list[BucketGroup] = []
    start = BucketGroup.start_grad_sync
    monkeypatch.setattr(BucketGroup, "start_grad_sync", lambda self, *rest: (sent.append(self), start(self, *rest)))
    for seed, missing in ((0, 0), (1, 0), (2, 1), (3, 9)):
        params: list[torch.nn.Parameter] = list(model.parameters())
        random.Random(seed).shuffle(params)
        wrapped.zero_grad_buffer()
        sent.clear()
        for param in params[missing:]:
            wrapped.param_to_bucket_group[param].register_grad_ready(param)
        assert missing or len(sent) == len(wrapped.sharded_buckets), "all are on their way before the pass is over"
        wrapped.finish_grad_sync()
        assert sent == wrapped.sharded_buckets
