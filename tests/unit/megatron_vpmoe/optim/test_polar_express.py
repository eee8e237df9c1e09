"""Polar Express: where singular values go, and that a batch, a transpose and a scale change nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.optim.polar_express import Iteration, choose_iteration, polar_express, polar_express_flops

SHAPES = [(8, 8), (8, 24), (24, 8), (1, 16), (16, 1)]


def matrices_with_spectrum(values: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """[1, rows, cols] fp64 with the given singular values."""
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(cols, len(values), dtype=torch.float64))
    return (left * values @ right.T)[None]


@pytest.mark.parametrize("iteration", ["direct", "gram"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (32, 80), (80, 32), (128, 1024)])
def test_singular_values_land_near_one(rows: int, cols: int, dtype: torch.dtype, iteration: Iteration) -> None:
    torch.manual_seed(0)
    spectrum = torch.logspace(0, -2, min(rows, cols), dtype=torch.float64)
    # Scaled so that the smallest is 0.01 after the division by the norm: the edge of the guaranteed interval.
    x = matrices_with_spectrum(spectrum, rows, cols)
    scaled_smallest = 0.01 / (spectrum.norm() * 1.02)
    values = torch.linalg.svdvals(polar_express(x.to(dtype), iteration=iteration).double())[0]
    assert scaled_smallest < 0.01
    inside = values[spectrum / (spectrum.norm() * 1.02) >= 0.01]
    assert len(inside) >= 20  # the spectrum is in descending order, as svdvals returns it
    assert inside.min() > 0.85 and inside.max() < 1.15
    assert values.max() < 1.15


def test_singular_vectors_are_kept() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 12, 20, dtype=torch.float64)
    left, _, right = torch.linalg.svd(x[0], full_matrices=False)
    rotated = left.T @ polar_express(x)[0] @ right.T
    assert torch.allclose(rotated, torch.diag(rotated.diagonal()), atol=1e-12)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_transpose_commutes(rows: int, cols: int) -> None:
    x = torch.randn(3, rows, cols, dtype=torch.float64)
    assert torch.allclose(polar_express(x.mT.contiguous()).mT, polar_express(x), atol=1e-12)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_a_stack_equals_its_matrices_one_by_one(rows: int, cols: int) -> None:
    x = torch.randn(5, rows, cols)
    alone = torch.cat([polar_express(matrix[None]) for matrix in x])
    assert torch.allclose(polar_express(x), alone, atol=1e-5)


def test_scale_of_one_matrix_matters_neither_to_it_nor_to_its_neighbours() -> None:
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    scaled = x * torch.tensor([1e4, 1.0], dtype=torch.float64)[:, None, None]
    assert torch.allclose(polar_express(scaled), polar_express(x), atol=1e-5)


def test_zero_stays_zero_and_the_input_is_untouched() -> None:
    x = torch.randn(2, 8, 8)
    x[0] = 0
    before = x.clone()
    result = polar_express(x)
    assert torch.equal(x, before)
    assert torch.equal(result[0], torch.zeros(8, 8))
    assert result.isfinite().all()


def test_dtype_follows_precision_of_the_device() -> None:
    assert polar_express(torch.randn(1, 4, 4)).dtype == torch.float32
    assert polar_express(torch.randn(1, 4, 4).bfloat16()).dtype == torch.float32
    assert polar_express(torch.randn(1, 4, 4).double()).dtype == torch.float64


@pytest.mark.parametrize("steps", [0, 6])
def test_steps_outside_the_table_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match="polar_express_steps"):
        polar_express(torch.randn(1, 4, 4), steps=steps)


def test_flops_do_not_depend_on_orientation() -> None:
    assert polar_express_flops(128, 1024) == polar_express_flops(1024, 128)
    assert polar_express_flops(2, 2, steps=1) == 3 * 2 * 2**3
    assert polar_express_flops(32, 128, iteration="gram") == polar_express_flops(128, 32, iteration="gram")


@pytest.mark.parametrize("iteration", ["direct", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("rows", "cols"), [(8, 24), (24, 8), (12, 12)])
def test_counted_flops_are_those_of_the_products(rows: int, cols: int, steps: int, iteration: Iteration) -> None:
    x = torch.randn(3, rows, cols)
    with FlopCounterMode(display=False) as counter:
        polar_express(x, steps=steps, iteration=iteration)
    assert counter.get_total_flops() == 3 * polar_express_flops(rows, cols, steps, iteration)


def test_the_gram_form_is_taken_where_it_has_fewer_operations_and_never_in_bf16() -> None:
    assert choose_iteration(128, 1024, torch.float32) == choose_iteration(1024, 128, torch.float32) == "gram"
    assert choose_iteration(128, 128, torch.float32) == "direct"
    assert choose_iteration(128, 1024, torch.bfloat16) == "direct"
    with pytest.raises(ConfigError, match="bf16"):
        polar_express(torch.randn(1, 4, 16), dtype=torch.bfloat16, iteration="gram")


@pytest.mark.parametrize("span", [4, 8])
@pytest.mark.parametrize(("rows", "cols"), [(32, 128), (256, 32)])
def test_the_gram_form_in_fp32_keeps_hopeless_directions_small(rows: int, cols: int, span: int) -> None:
    """Far below 0.01 rounding in A could be blown up: these singular values stay where the formula has them."""
    torch.manual_seed(2)
    x = matrices_with_spectrum(torch.logspace(0, -span, 32, dtype=torch.float64), rows, cols)
    exact, ours = polar_express(x), polar_express(x.float(), iteration="gram").double()
    assert (ours - exact).norm() / exact.norm() < 1e-2
    assert (torch.linalg.svdvals(ours) - torch.linalg.svdvals(exact)).abs().max() < 5e-3


@pytest.mark.parametrize(("rows", "cols"), [(32, 128), (128, 32), (128, 1024)])
def test_in_bf16_singular_values_land_near_one(rows: int, cols: int) -> None:
    torch.manual_seed(3)
    for x in (torch.randn(1, rows, cols), matrices_with_spectrum(torch.logspace(0, -0.8, 32).double(), rows, cols)):
        values = torch.linalg.svdvals(polar_express(x, dtype=torch.bfloat16).double())[0][:32]
        assert values.min() > 0.83 and values.max() < 1.17
