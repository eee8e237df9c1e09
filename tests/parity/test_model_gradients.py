"""Gradients of the whole dense model by finite differences of its loss, in fp64: nothing of autograd on one side."""

from __future__ import annotations

import pytest
import torch
from student_cases import DENSE, lively_model, packed, random_tokens
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.model.gpt import VPModel

pytestmark = pytest.mark.usefixtures("single_process")

STEP, LENGTH = 1e-5, 30


def loss_of(model: VPModel) -> Tensor:
    """fp64 cross-entropy of the next token over two packed documents."""
    tokens = random_tokens(LENGTH)
    logits = model(tokens, packed(18, 12)).logits()
    return functional.cross_entropy(logits[0, :-1], tokens[0, 1:])


def slope(model: VPModel, parameter: Tensor, direction: Tensor) -> float:
    """The loss's derivative along ``direction``, by central differences."""
    values = []
    with torch.no_grad():
        start = parameter.clone()
        for sign in (1, -1):
            parameter.copy_(start + sign * STEP * direction)
            values.append(float(loss_of(model)))
        parameter.copy_(start)
    return (values[0] - values[1]) / (2 * STEP)


@pytest.fixture
def model() -> VPModel:
    return lively_model(torch.float64, **DENSE)


def with_ending(model: VPModel, *endings: str) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith(endings)}


@pytest.mark.parametrize("ending", ["grape_log_freq", "sink", "value_residual_scale"])
def test_every_element_of_the_scalars(model: VPModel, ending: str) -> None:
    loss_of(model).backward()
    parameters = with_ending(model, ending)
    # GRAPE-M in local layers, sinks in all, the mix from layer 2 on.
    assert len(parameters) == {"grape_log_freq": 3, "sink": 4, "value_residual_scale": 3}[ending]
    for name, parameter in parameters.items():
        gradient = parameter.grad.flatten()
        for element in range(parameter.numel()):
            direction = torch.zeros(parameter.numel(), dtype=torch.float64)
            direction[element] = 1.0
            measured = slope(model, parameter, direction.view_as(parameter))
            assert gradient[element].item() == pytest.approx(measured, rel=1e-6, abs=1e-9), f"{name}[{element}]"
        assert gradient.abs().max() > 1e-6, f"{name} has no gradient worth measuring"


@pytest.mark.parametrize("ending", ["linear_tpa_a.weight", "linear_tpa_a.bias", "linear_tpa_b.weight", "qkv_bias"])
def test_tensor_product_factors_along_random_directions(model: VPModel, ending: str) -> None:
    """Three directions in each of the factor matrices' row groups (those of queries, keys and values)."""
    loss_of(model).backward()
    generator = torch.Generator().manual_seed(7)
    parameters = with_ending(model, ending)
    assert len(parameters) == 3
    for name, parameter in parameters.items():
        for rows in getattr(parameter, "matrix_rows", (slice(None),)):
            direction = torch.zeros_like(parameter)
            direction[rows] = torch.randn(parameter[rows].shape, generator=generator, dtype=torch.float64)
            along = float((parameter.grad * direction).sum())
            assert along == pytest.approx(slope(model, parameter, direction), rel=1e-5, abs=1e-9), name


def test_every_other_parameter_along_a_random_direction(model: VPModel) -> None:
    loss_of(model).backward()
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        along = float((parameter.grad * direction).sum())
        assert along == pytest.approx(slope(model, parameter, direction), rel=1e-5, abs=1e-8), name
