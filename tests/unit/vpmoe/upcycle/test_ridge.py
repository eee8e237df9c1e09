"""Ridge regression: the closed form, batch by batch or at once."""

from __future__ import annotations

import numpy as np
import torch

from vpmoe.upcycle.block_regression import Ridge

ROWS, FEATURES, TARGETS, STRENGTH = 60, 7, 3, 0.05


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64) + 2
    return x, torch.randn(ROWS, TARGETS, generator=generator, dtype=torch.float64) + x[:, :TARGETS]


def test_it_is_least_squares_with_rows_for_the_penalty() -> None:
    """Against numpy's solver on the centred data with a row more for each penalised weight."""
    x, y = _data()
    solver = Ridge(FEATURES, TARGETS)
    for part in (slice(0, 11), slice(11, ROWS)):
        solver.add(x[part], y[part])
    weight, bias = solver.solve(STRENGTH)
    centred_x, centred_y = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    penalty = STRENGTH * (centred_x**2).sum(0).mean()
    rows = np.concatenate([centred_x, np.sqrt(penalty) * np.eye(FEATURES)])
    expected, *_ = np.linalg.lstsq(rows, np.concatenate([centred_y, np.zeros((FEATURES, TARGETS))]), rcond=None)
    np.testing.assert_allclose(weight.numpy(), expected.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(bias.numpy(), y.mean(0).numpy() - expected.T @ x.mean(0).numpy(), rtol=1e-10)


def test_a_linear_map_is_found_and_a_feature_that_never_varies_has_no_weight() -> None:
    x, _ = _data()
    x[:, 2] = 5.0
    generator = torch.Generator().manual_seed(1)
    true = torch.randn(TARGETS, FEATURES, generator=generator, dtype=torch.float64)
    solver = Ridge(FEATURES, TARGETS)
    solver.add(x, x @ true.t() + 1)
    weight, bias = solver.solve(0.0)
    torch.testing.assert_close(x @ weight.t() + bias, x @ true.t() + 1)
    assert not weight[:, 2].any()
