"""What the cache keeps and returns."""

from __future__ import annotations

import torch

from megatron_vpmoe.model.attention.kv_cache import KVCache


def rows(begin: int, end: int) -> torch.Tensor:
    return torch.arange(begin, end, dtype=torch.float32).view(1, 1, -1, 1)


def test_global_layers_keep_everything() -> None:
    cache = KVCache()
    cache.append(4, rows(0, 5), -rows(0, 5))
    key, value = cache.append(4, rows(5, 6), -rows(5, 6))
    assert torch.equal(key, rows(0, 6)) and torch.equal(value, -rows(0, 6))


def test_local_layers_keep_what_a_new_query_can_reach() -> None:
    cache = KVCache()
    key, _ = cache.append(1, rows(0, 10), rows(0, 10), window=4)
    assert torch.equal(key, rows(0, 10)), "the prompt's own queries need all of its keys"
    key, _ = cache.append(1, rows(10, 11), rows(10, 11), window=4)
    assert torch.equal(key, rows(7, 11))
    key, _ = cache.append(1, rows(11, 13), rows(11, 13), window=4)
    assert torch.equal(key, rows(8, 13))


def test_window_of_one_keeps_nothing() -> None:
    cache = KVCache()
    cache.append(1, rows(0, 3), rows(0, 3), window=1)
    key, _ = cache.append(1, rows(3, 4), rows(3, 4), window=1)
    assert torch.equal(key, rows(3, 4))
