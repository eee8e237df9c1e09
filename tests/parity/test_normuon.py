"""NorMuon on stacks against the fp64 reference that takes one matrix at a time, through an SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vpmoe.optim.normuon import NorMuon, NorMuonOptions
from megatron_vpmoe.optim.polar_express import COEFFICIENTS, Iteration, polar_express
from ref import normuon as reference

SHAPES = [(8, 8), (8, 32), (32, 8), (1, 6), (6, 1)]


def test_the_two_coefficient_tables_agree() -> None:
    assert [list(row) for row in COEFFICIENTS] == reference.POLYNOMIALS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("iteration", ["direct", "gram"])
def test_polar_express(shape: tuple[int, int], steps: int, iteration: Iteration) -> None:
    x = torch.randn(4, *shape, dtype=torch.float64)
    ours = polar_express(x, steps=steps, iteration=iteration).numpy()
    theirs = np.stack([reference.polar_express(matrix, steps) for matrix in x.numpy()])
    np.testing.assert_allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("iteration", ["direct", "gram"])
def test_polar_express_in_fp32_of_an_ill_conditioned_matrix(iteration: Iteration) -> None:
    x = torch.randn(2, 64, 256, dtype=torch.float64) * torch.logspace(0, -5, 64, dtype=torch.float64)[:, None]
    theirs = np.stack([reference.polar_express(matrix) for matrix in x.numpy()])
    np.testing.assert_allclose(polar_express(x.float(), iteration=iteration).numpy(), theirs, atol=1e-3)


def logical_matrices(param: torch.nn.Parameter, value: torch.Tensor) -> list[np.ndarray]:
    rows = getattr(param, "matrix_rows", (slice(None),))
    if param.ndim == 3:
        return [expert[group].numpy() for expert in value for group in rows]
    return [value[group].numpy() for group in rows]


def every_kind_of_parameter(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Plain matrices, mixed QKV of two query groups, TPA-like factors, experts of both orientations and gated."""
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    qkv = torch.nn.Parameter(torch.randn(32, 8, dtype=dtype))
    rows = torch.arange(32).view(2, 16)
    qkv.matrix_rows = (rows[:, :8].flatten(), rows[:, 8:12].flatten(), rows[:, 12:].flatten())  # type: ignore[attr-defined]
    factors = torch.nn.Parameter(torch.randn(14, 8, dtype=dtype))
    factors.matrix_rows = (slice(0, 8), slice(8, 11), slice(11, 14))  # type: ignore[attr-defined]
    experts = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 8, 32), (5, 32, 8))]
    gated = torch.nn.Parameter(torch.randn(3, 16, 32, dtype=dtype))
    gated.matrix_rows = (slice(0, 8), slice(8, 16))  # type: ignore[attr-defined]
    return [*params, qkv, factors, *experts, gated]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_five_steps(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    params = every_kind_of_parameter(dtype)
    optimizer = NorMuon(params, 0.1, 0.2, options=NorMuonOptions(momentum=0.9, beta2=0.8))
    states = [[reference.MatrixState.start(m) for m in logical_matrices(p, p.detach())] for p in params]
    for step in range(5):
        for index, param in enumerate(params):
            param.grad = torch.randn_like(param)
            if step == 2 and param.ndim == 2:
                param.grad.zero_()
            states[index] = [
                reference.step(state, grad, lr=0.1, weight_decay=0.2, beta=0.9, beta2=0.8)
                for state, grad in zip(states[index], logical_matrices(param, param.grad), strict=True)
            ]
        optimizer.step()
    for param, expected in zip(params, states, strict=True):
        state = optimizer.state[param]
        for name, value in (("weight", param), ("momentum", state["momentum_buffer"])):
            for ours, theirs in zip(logical_matrices(param, value.detach()), expected, strict=True):
                np.testing.assert_allclose(ours, getattr(theirs, name), atol=tolerance)
        statistics = logical_matrices(param, state["second_moment"])
        for ours, theirs in zip(statistics, expected, strict=True):
            np.testing.assert_allclose(ours[:, 0], theirs.second_moment, atol=tolerance)
