"""Polar Express: the nearest semi-orthogonal matrix of many matrices at once, by five matrix polynomials.

Shapes: N matrices of R rows and C columns; S = min(R, C).
"""

from __future__ import annotations

import torch

from megatron_vpmoe.errors import ConfigError

COEFFICIENTS: tuple[tuple[float, float, float], ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""(a, b, c) of each iteration: the minimax odd polynomials of degree 5 (Polar Express, arXiv 2505.16932)."""

_NORM_FLOOR = 1e-6


def polar_express(x_NRC: torch.Tensor, *, steps: int = 5, safety: float = 2e-2) -> torch.Tensor:
    """Map the singular values of every matrix towards 1 and keep its singular vectors.

    X_0 = X / (|X|_F (1 + safety) + 1e-6); X <- a X + (b A + c A^2) X with A = X X^T. Singular values in [0.01, 1] of
    X_0 come out in [0.859, 1.141]; a zero matrix stays zero. The symmetric product A is formed on the smaller side
    (X^T X, applied from the right, when R > C), which is the same polynomial at fewer operations.

    Args:
        x_NRC: [N, R, C], any floating dtype; not modified.
        steps: iterations, 1 to 5.
        safety: relative headroom on the norm, so that rounding cannot push a singular value past 1.

    Returns:
        [N, R, C] in the dtype it was computed in: bf16 on CUDA, fp32 on CPU, fp64 for an fp64 input on either.

    Raises:
        ConfigError: ``steps`` outside the coefficient table.
    """
    if not 1 <= steps <= len(COEFFICIENTS):
        raise ConfigError(
            f"polar_express_steps is {steps}", remedy=f"a value from 1 to {len(COEFFICIENTS)}, the coefficients known"
        )
    norm_N11 = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True, dtype=_norm_dtype(x_NRC))
    x_NRC = (x_NRC / (norm_N11 * (1.0 + safety) + _NORM_FLOOR)).to(_compute_dtype(x_NRC))
    wide = x_NRC.shape[1] <= x_NRC.shape[2]
    for a, b, c in COEFFICIENTS[:steps]:
        gram_NSS = torch.bmm(x_NRC, x_NRC.mT) if wide else torch.bmm(x_NRC.mT, x_NRC)
        factor_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c)
        left, right = (factor_NSS, x_NRC) if wide else (x_NRC, factor_NSS)
        x_NRC = torch.baddbmm(x_NRC, left, right, beta=a)
    return x_NRC


def polar_express_flops(rows: int, cols: int, steps: int = 5) -> int:
    """Multiplications and additions that ``polar_express`` spends on one matrix of ``rows`` x ``cols``."""
    small, large = min(rows, cols), max(rows, cols)
    return steps * (2 * small * small * large * 2 + 2 * small**3)


def _norm_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.is_cuda else torch.float32
