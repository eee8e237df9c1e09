"""Draws by counter: the published generator, spread as they should be, and from nothing but key and place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.runtime.counter import draw_key, normal, random_bits, uniform
from ref import splitmix

_INT64 = st.integers(-(2**63), 2**63 - 1)


def test_uniform_numbers() -> None:
    """Splitmix64's published first outputs for seed 0; spread evenly; another for each position, sample and prompt."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    numbers = uniform(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert numbers.tolist() == [(word >> 11) * 2.0**-53 for word in published]
    keys = torch.tensor([draw_key(s, p, n) for s in range(10) for p in range(10) for n in range(10)])
    numbers = torch.stack([uniform(keys, torch.full_like(keys, position)) for position in range(50)])
    assert len(numbers.unique()) == 50_000
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.005)
    assert numbers.histc(10, 0, 1).tolist() == pytest.approx([5000] * 10, rel=0.06)


@given(key=_INT64, count=st.integers(1, 9))
def test_bits_and_normal_numbers_by_the_definition(key: int, count: int) -> None:
    bits = random_bits(torch.tensor(key), torch.arange(count))
    assert [word % 2**64 for word in bits.tolist()] == splitmix.outputs(key % 2**64, count)
    found = normal(torch.tensor([key]), count)
    assert found.shape == (1, count) and found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx(splitmix.normals(key % 2**64, count), rel=1e-4, abs=1e-9)


def test_normal_numbers_are_standard_and_independent() -> None:
    keys = random_bits(torch.tensor(draw_key(7, 1)), torch.arange(4000))
    x = normal(keys, 24)
    assert float(x.mean()) == pytest.approx(0, abs=0.01)
    covariance = x.T @ x / len(x)
    torch.testing.assert_close(covariance, torch.eye(24), atol=0.08, rtol=0)
    between = x[:-1].flatten() @ x[1:].flatten() / x[1:].numel()
    assert float(between) == pytest.approx(0, abs=0.02)
    assert float((x.abs() > 1.96).float().mean()) == pytest.approx(0.05, abs=0.005)


def test_a_number_hangs_on_its_key_alone() -> None:
    keys = random_bits(torch.tensor(3), torch.arange(10)).view(2, 5)
    together = normal(keys, 7)
    assert together.shape == (2, 5, 7)
    torch.testing.assert_close(normal(keys[1, 3], 7), together[1, 3], rtol=0, atol=0)
    torch.testing.assert_close(normal(keys.flip(1), 3), together.flip(1)[..., :3], rtol=0, atol=0)
