"""Fitting a block: what it can represent it finds, and nothing makes its error larger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vpmoe.errors import UpcycleError
from vpmoe.upcycle.block_regression import Block, Regression, fit

HIDDEN, WIDTH, BATCHES, TOKENS = 6, 10, 4, 64


class SquaredReLU(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().square())


def _block(module: SquaredReLU, teacher: SquaredReLU, noise: float = 0.0) -> Block:
    """Two rows of tokens a batch, some of them padding with targets of their own size."""
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(TOKENS, 2, HIDDEN, generator=generator) for _ in range(BATCHES)]
    rows = [torch.rand(2 * TOKENS, generator=generator) < 0.9 for _ in inputs]
    with torch.no_grad():
        targets = [teacher(x).flatten(0, 1)[real] for x, real in zip(inputs, rows, strict=True)]
    targets = [y + noise * torch.randn(y.shape, generator=generator) for y in targets]
    return Block(module.requires_grad_(False), module.second, lambda i: module(inputs[i]), rows, targets)


def test_the_closed_form_recovers_a_last_matrix() -> None:
    teacher, student = SquaredReLU(0), SquaredReLU(1)
    with torch.no_grad():
        student.first.weight.copy_(teacher.first.weight)
        student.first.bias.copy_(teacher.first.bias)
    errors = fit(_block(student, teacher), Regression(ridge=0.0, steps=0, learning_rate=0.1, seed=0))
    assert errors["start"] > 0.5 and errors["kept"] == errors["ridge"] < 1e-5
    torch.testing.assert_close(student.second.weight, teacher.second.weight, rtol=1e-4, atol=1e-4)


def test_steps_go_below_the_closed_form_and_are_repeatable() -> None:
    def fitted() -> tuple[dict[str, float], SquaredReLU]:
        student = SquaredReLU(1)
        return fit(_block(student, SquaredReLU(0)), Regression(1e-6, steps=150, learning_rate=0.05, seed=3)), student

    (errors, student), (again, other) = fitted(), fitted()
    assert errors["steps and ridge"] < 0.6 * errors["ridge"] and errors == again
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize(("ridge", "rate"), [(1e3, 0.05), (1e-3, 50.0)])
def test_what_makes_it_worse_is_not_kept(ridge: float, rate: float) -> None:
    """From the right block, with a penalty or steps that are far too large."""
    teacher, student = SquaredReLU(0), SquaredReLU(0)
    block = _block(student, teacher, noise=0.1)
    errors = fit(block, Regression(ridge, steps=5, learning_rate=rate, seed=0))
    assert errors["kept"] == min(errors.values()) <= errors["start"] < max(errors.values())
    assert block.error() == pytest.approx(errors["kept"])


def test_divergence_is_an_error() -> None:
    with pytest.raises(UpcycleError, match="diverges"):
        fit(_block(SquaredReLU(1), SquaredReLU(0)), Regression(1e-6, steps=5, learning_rate=1e30, seed=0))
