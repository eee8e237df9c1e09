"""RMSNorm against torch's, in value and gradient, and its statistics in fp32."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from megatron_vpmoe.model.norm import rms_norm


@pytest.mark.parametrize("shape", [(3, 8), (5, 2, 4, 16)])
def test_equals_torch(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    weight = torch.randn(shape[-1], generator=generator, requires_grad=True)
    grad = torch.randn(shape, generator=generator)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = functional.rms_norm(exact[0], (shape[-1],), exact[1], 1e-6)
    got = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip(torch.autograd.grad(got, (x, weight), grad), wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_bf16_statistics_are_fp32() -> None:
    """A mean of squares that bf16 cannot hold: 256 ones and a 16 give 2, not the 1.99 or 2.0 of rounded sums."""
    x = torch.cat([torch.ones(256), torch.tensor([16.0])]).bfloat16()
    normed = rms_norm(x, torch.ones(257), 0.0)
    assert normed.dtype == torch.bfloat16
    expected = (x.double() / x.double().square().mean().sqrt()).bfloat16()
    assert torch.equal(normed, expected)
