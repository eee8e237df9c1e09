"""The mix with layer 1's values."""

from __future__ import annotations

import torch

from megatron_vpmoe.model.attention.value_residual import mix_first_value


def test_one_is_the_identity_bit_for_bit_with_a_live_gradient() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        value, first = torch.randn(3, 2, 2, 8).to(dtype), torch.randn(3, 2, 2, 8).to(dtype)
        scale = torch.ones((), requires_grad=True)
        mixed = mix_first_value(value, first, scale)
        assert torch.equal(mixed, value) and mixed.dtype == dtype
        mixed.float().sum().backward()
        assert scale.grad is not None
        torch.testing.assert_close(scale.grad, (value.float() - first.float()).sum(), rtol=1e-2, atol=1e-2)


def test_gradients_by_finite_differences() -> None:
    value, first = (torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mix_first_value, (value, first, scale))


def test_bf16_values_see_a_scale_that_bf16_could_not_hold() -> None:
    value, first = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.full((1, 1, 1, 1), 1024.0, dtype=torch.bfloat16)
    assert mix_first_value(value, first, torch.tensor(0.999)).item() == torch.tensor(1.024).bfloat16().item()
