"""Tensor-product projections: layout, gradients, variance at the start."""

from __future__ import annotations

import pytest
import torch

from megatron_vpmoe.model.attention.tpa import _LOOPED_BELOW, TPAGeometry, contract_factors, factor_a_init, section_rows

GEOMETRY = TPAGeometry(num_heads=4, num_groups=2, head_dim=6, q_rank=3, rank=2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "geometry",
    [GEOMETRY, TPAGeometry(num_heads=8, num_groups=4, head_dim=26, q_rank=4, rank=4)],
    ids=["small", "large"],
)
def test_gradients_by_finite_differences(geometry: TPAGeometry) -> None:
    """Of products small enough to be summed up by hand, and of others."""
    a, b = (draw(2, 1, sum(sizes)).requires_grad_() for sizes in (geometry.a_sizes, geometry.b_sizes))
    bias = draw(geometry.head_dim * (geometry.num_heads + 2 * geometry.num_groups), seed=1).requires_grad_()
    smallest = geometry.num_groups * geometry.rank * geometry.head_dim
    assert (smallest >= _LOOPED_BELOW) is (geometry is not GEOMETRY)
    for biases in ((), (bias,)):
        assert torch.autograd.gradcheck(lambda a, b, *bias: contract_factors(a, b, geometry, *bias), (a, b, *biases))


def test_identity_factors_give_a_dense_projection_exactly() -> None:
    """A_k = A_v = R·I with R = G, A_q = Rq·I with Rq = H: the projections are B itself, which is linear in x."""
    geometry = TPAGeometry(num_heads=4, num_groups=2, head_dim=6, q_rank=4, rank=2)
    constant = torch.cat([(4 * torch.eye(4)).flatten(), (2 * torch.eye(2)).flatten(), (2 * torch.eye(2)).flatten()])
    b = draw(5, 3, sum(geometry.b_sizes))
    query, key, value = contract_factors(constant.double().expand(5, 3, -1), b, geometry)
    assert torch.equal(query, b[..., :24].unflatten(-1, (4, 6)))
    assert torch.equal(key, b[..., 24:36].unflatten(-1, (2, 6)))
    assert torch.equal(value, b[..., 36:].unflatten(-1, (2, 6)))


def test_variance_at_the_start_is_a_dense_projections() -> None:
    hidden, std = 256, 0.02
    geometry = TPAGeometry(num_heads=8, num_groups=8, head_dim=64, q_rank=4, rank=2)
    torch.manual_seed(0)
    a_weight = factor_a_init(geometry)(torch.empty(sum(geometry.a_sizes), hidden))
    b_weight = torch.empty(sum(geometry.b_sizes), hidden).normal_(0, std)
    x = torch.randn(512, 1, hidden)
    dense = (x @ torch.empty(512, hidden).normal_(0, std).t()).var()
    for projected in contract_factors(x @ a_weight.t(), x @ b_weight.t(), geometry):
        assert 0.7 < projected.var() / dense < 1.4


def test_section_rows_cover_the_weight_once() -> None:
    sizes = GEOMETRY.a_sizes
    rows = torch.cat([torch.arange(sum(sizes))[section] for section in section_rows(sizes)])
    assert rows.tolist() == list(range(sum(sizes)))
    assert [section.stop - section.start for section in section_rows(sizes)] == [12, 4, 4]
