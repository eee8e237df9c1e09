"""NorMuon with Polar Express, one matrix at a time in fp64 numpy: slow, and plainly the formulas.

Polar Express is an odd polynomial, so it acts on the singular values alone: here it is applied to them through an SVD,
without a single matrix iteration. Sources: NorMuon (arXiv 2510.05491), Polar Express (arXiv 2505.16932).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

POLYNOMIALS = [
    [8.156554524902461, -22.48329292557795, 15.878769915207462],
    [4.042929935166739, -2.808917465908714, 0.5000178451051316],
    [3.8916678022926607, -2.772484153217685, 0.5060648178503393],
    [3.285753657755655, -2.3681294933425376, 0.46449024233003106],
    [2.3465413258596377, -1.7097828382687081, 0.42323551169305323],
]


def polar_express(matrix: np.ndarray, steps: int = 5, safety: float = 2e-2) -> np.ndarray:
    """[out, in] -> [out, in]: the same singular vectors, singular values through the composed polynomials."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    values = values / (np.sqrt(np.sum(values**2)) * (1 + safety) + 1e-6)
    for a, b, c in POLYNOMIALS[:steps]:
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


@dataclass
class MatrixState:
    """Weight [out, in], momentum [out, in] and second moment [out] of one logical matrix, all fp64."""

    weight: np.ndarray
    momentum: np.ndarray
    second_moment: np.ndarray

    @classmethod
    def start(cls, weight: np.ndarray) -> MatrixState:
        """Zero momentum and second moment for ``weight`` [out, in]."""
        return cls(weight.astype(np.float64), np.zeros(weight.shape), np.zeros(weight.shape[0]))


def step(
    state: MatrixState,
    gradient: np.ndarray,
    *,
    lr: float,
    weight_decay: float,
    beta: float = 0.95,
    beta2: float = 0.95,
    eps: float = 1e-10,
    steps: int = 5,
    safety: float = 2e-2,
) -> MatrixState:
    """One NorMuon step of one matrix; ``gradient`` is [out, in]. Returns the new state."""
    rows, columns = gradient.shape
    gradient = gradient.astype(np.float64)
    momentum = beta * state.momentum + (1 - beta) * gradient
    nesterov = (1 - beta) * gradient + beta * momentum
    update = polar_express(nesterov, steps, safety)
    second_moment = state.second_moment.copy()
    norm_before = np.sqrt(np.sum(update**2))
    for row in range(rows):
        second_moment[row] = beta2 * second_moment[row] + (1 - beta2) * np.sum(update[row] ** 2) / columns
        update[row] = update[row] / np.sqrt(second_moment[row] + eps)
    norm_after = np.sqrt(np.sum(update**2))
    if norm_after > 0:
        update = update * norm_before / norm_after
    update = update * np.sqrt(max(1.0, rows / columns))
    weight = state.weight * (1 - lr * weight_decay) - lr * update
    return MatrixState(weight, momentum, second_moment)
