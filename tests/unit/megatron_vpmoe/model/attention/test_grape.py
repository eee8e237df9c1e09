"""GRAPE-M and GRAPE-A: invariances, the equality with RoPE at the start, and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vpmoe.model.attention.grape import (
    alibi_slopes,
    initial_log_frequencies,
    rope_frequencies,
    rotate,
    rotation_angles,
)

BASE, SCALE = 1_000_000.0, 16.0
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frequencies(head_dim: int) -> torch.Tensor:
    return torch.exp(initial_log_frequencies(head_dim, BASE, SCALE).double() / SCALE) * (1 + 0.1 * draw(head_dim // 2))


def test_scores_depend_on_distance_alone() -> None:
    query, key, frequency = draw(1, 1, 2, 64), draw(1, 1, 2, 64, seed=1), frequencies(64)

    def score(i: int, j: int) -> torch.Tensor:
        turned = [rotate(x, rotation_angles(torch.tensor([[t]]), frequency)) for x, t in ((query, i), (key, j))]
        return (turned[0] * turned[1]).sum(-1)

    for shift in (1, 17, 2000):
        torch.testing.assert_close(score(9 + shift, 4 + shift), score(9, 4), rtol=0, atol=1e-12 * 64)


def test_norms_are_preserved() -> None:
    x = draw(5, 2, 3, 64)
    turned = rotate(x, rotation_angles(torch.arange(10).view(2, 5), frequencies(64)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    assert not torch.allclose(turned[1:], x[1:])


def test_equals_rope_at_initialisation() -> None:
    learned = torch.exp(initial_log_frequencies(128, BASE, SCALE) / SCALE)
    torch.testing.assert_close(learned, rope_frequencies(128, BASE, CPU), rtol=2e-6, atol=0)
    assert initial_log_frequencies(128, BASE, SCALE)[5] == pytest.approx(SCALE * math.log(BASE ** (-10 / 128)))


def test_pairing_and_sign_are_half_rotation() -> None:
    x = torch.tensor([1.0, 10.0, 2.0, 20.0], dtype=torch.float64).view(1, 1, 1, 4)
    angle = torch.tensor([math.pi / 2, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    torch.testing.assert_close(rotate(x, angle).flatten().tolist(), [-2.0, 10.0, 1.0, 20.0])


def test_gradients_by_finite_differences() -> None:
    x = draw(3, 2, 2, 6).requires_grad_()
    log_frequency = (SCALE * draw(3, seed=3) / 3).requires_grad_()
    position = torch.tensor([[0, 1, 2], [5, 0, 7]])

    def turned(x: torch.Tensor, log_frequency: torch.Tensor) -> torch.Tensor:
        return rotate(x, rotation_angles(position, torch.exp(log_frequency / SCALE)))

    assert torch.autograd.gradcheck(turned, (x, log_frequency))


def test_bf16_inputs_are_rotated_in_fp32() -> None:
    x = draw(2, 1, 1, 64).to(torch.bfloat16)
    position = torch.tensor([[1999, 2001]])
    angle = rotation_angles(position, rope_frequencies(64, BASE, CPU))
    turned = rotate(x, angle)
    assert turned.dtype == torch.bfloat16
    exact = rotate(x.double(), rotation_angles(position, rope_frequencies(64, BASE, CPU).double()))
    torch.testing.assert_close(turned, exact.to(torch.bfloat16), rtol=1e-2, atol=1e-2)


def test_slopes() -> None:
    cpu = torch.device("cpu")
    assert alibi_slopes(8, cpu).tolist() == [2.0**-n for n in range(1, 9)]
    # The ALiBi paper's rule for 12 heads: the slopes of 8, then every other slope of 16.
    expected = [2.0**-n for n in range(1, 9)] + [2.0 ** (-0.5 * n) for n in (1, 3, 5, 7)]
    torch.testing.assert_close(alibi_slopes(12, cpu), torch.tensor(expected))
    with torch.inference_mode():
        assert not alibi_slopes(7, cpu).is_inference()


def test_fp64_inputs_are_not_narrowed_to_fp32_angles() -> None:
    x = draw(2, 1, 1, 64)
    angle = rotation_angles(torch.tensor([[1, 1999]]), rope_frequencies(64, BASE, CPU))
    assert torch.equal(rotate(x, torch.zeros_like(angle)), x)
