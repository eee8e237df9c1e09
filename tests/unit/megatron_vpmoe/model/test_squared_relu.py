"""ReLU² and its written-out derivative are those of autograd, bit for bit."""

from __future__ import annotations

import pytest
import torch

from megatron_vpmoe.model.transformer_config import squared_relu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_derivative(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, 16, dtype=dtype).transpose(0, 1).requires_grad_()
    grad = torch.randn(7, 5, 16, dtype=dtype)
    ours, autograds = squared_relu(x), torch.relu(x).square()
    assert torch.equal(ours, autograds)
    (own,), (other,) = (torch.autograd.grad(out, x, grad) for out in (ours, autograds))
    assert own.dtype == dtype and torch.equal(own, other)
    assert bool((own[x <= 0] == 0).all()) and bool((own[x > 0] != 0).any())
