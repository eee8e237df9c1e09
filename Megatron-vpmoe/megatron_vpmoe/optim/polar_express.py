"""Polar Express: the nearest semi-orthogonal matrix of many matrices at once, by five matrix polynomials.

Shapes: N matrices of R rows and C columns; S = min(R, C), L = max(R, C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_vpmoe.config.orthogonal import Form as Iteration
from megatron_vpmoe.config.orthogonal import polar_express_flops
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


def compute_dtype(device_type: str) -> torch.dtype:
    """bf16 on CUDA, whose tensor cores want it; fp32 on CPU, where bf16 gains nothing."""
    return torch.bfloat16 if device_type == "cuda" else torch.float32


def choose_iteration(rows: int, cols: int, dtype: torch.dtype, steps: int = 5) -> Iteration:
    """The form with fewer operations; always "direct" in bf16.

    The Gram form keeps A apart from X, so rounding in A is multiplied by a² in each iteration for directions of small
    singular values: about 2e5 until the last. In fp32 that leaves 1 % of error in such a direction, in bf16 no digit.
    """
    if dtype == torch.bfloat16:
        return "direct"
    gram, direct = (polar_express_flops(rows, cols, steps, form) for form in ("gram", "direct"))
    return "gram" if gram < direct else "direct"


def polar_express(
    x_NRC: torch.Tensor,
    *,
    steps: int = 5,
    safety: float = 2e-2,
    dtype: torch.dtype | None = None,
    iteration: Iteration | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Map the singular values of every matrix towards 1 and keep its singular vectors.

    X_0 = X / (|X|_F (1 + safety) + 1e-6); X <- p(A) X with A = X X^T and p(A) = a I + b A + c A². Singular values in
    [0.01, 1] of X_0 come out in [0.859, 1.141]; a zero matrix stays zero. A is formed on the smaller side (X^T X,
    applied from the right, when R > C), which is the same polynomial at fewer operations. Two forms of it:

    - "direct" forms A from X anew in each iteration: 4 S² L + 2 S³ operations each;
    - "gram" forms A once and iterates on it alone, A <- p(A)² A, with Q <- p(A) Q beside it, and applies Q to X at the
      end: 4 S² L once, and about 8 S³ an iteration. The matrices commute, being polynomials in one A.

    Args:
        x_NRC: [N, R, C], any floating dtype; not modified.
        steps: iterations, 1 to 5.
        safety: relative headroom on the norm, so that rounding cannot push a singular value past 1.
        dtype: to compute in; None: bf16 on CUDA, fp32 on CPU, fp64 for an fp64 input on either.
        iteration: the form; None: ``choose_iteration``.
        workspace: buffers to work in; the result is one of them, and lasts until the next call with it.

    Returns:
        [N, R, C] in the dtype it was computed in.

    Raises:
        ConfigError: ``steps`` outside the coefficient table, or the Gram form in bf16.
    """
    if not 1 <= steps <= len(COEFFICIENTS):
        raise ConfigError(
            f"polar_express_steps is {steps}", remedy=f"a value from 1 to {len(COEFFICIENTS)}, the coefficients known"
        )
    exact = x_NRC.dtype == torch.float64
    dtype = dtype or (torch.float64 if exact else compute_dtype(x_NRC.device.type))
    iteration = iteration or choose_iteration(x_NRC.shape[1], x_NRC.shape[2], dtype, steps)
    if iteration == "gram" and dtype == torch.bfloat16:
        raise ConfigError("the Gram form of Polar Express loses its small directions in bf16", remedy="use direct")
    workspace = Workspace() if workspace is None else workspace
    if iteration == "gram":
        return _gram_form(x_NRC.to(dtype), steps, safety, workspace)
    norm_N11 = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True, dtype=None if exact else torch.float32)
    scaled_NRC = workspace.take("scaled", x_NRC.shape, dtype, x_NRC.device)
    torch.mul(x_NRC, _normalizer(norm_N11, safety), out=scaled_NRC)
    return _direct_form(scaled_NRC, steps, workspace)


def _normalizer(norm_N11: torch.Tensor, safety: float) -> torch.Tensor:
    return torch.rsub(norm_N11, _NORM_FLOOR, alpha=-1.0 - safety).reciprocal_()  # of floor + norm (1 + safety)


class Workspace:
    """Buffers that stay from stack to stack: fresh ones cost a CPU more in page faults than the products in them."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor over the buffer ``name``, valid until the same name is taken again."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype, device))
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[name, dtype, device] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)


def _direct_form(x_NRC: torch.Tensor, steps: int, workspace: Workspace) -> torch.Tensor:
    wide, (gram_NSS, factor_NSS) = _small_side(x_NRC, workspace, 2)
    next_NRC = workspace.take("next", x_NRC.shape, x_NRC.dtype, x_NRC.device)
    for a, b, c in COEFFICIENTS[:steps]:
        torch.bmm(x_NRC, x_NRC.mT, out=gram_NSS) if wide else torch.bmm(x_NRC.mT, x_NRC, out=gram_NSS)
        torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c, out=factor_NSS)
        left, right = (factor_NSS, x_NRC) if wide else (x_NRC, factor_NSS)
        torch.baddbmm(x_NRC, left, right, beta=a, out=next_NRC)
        x_NRC, next_NRC = next_NRC, x_NRC
    return x_NRC


def _gram_form(x_NRC: torch.Tensor, steps: int, safety: float, workspace: Workspace) -> torch.Tensor:
    wide, (gram_NSS, factor_NSS, product_NSS, spare_NSS) = _small_side(x_NRC, workspace, 4)
    torch.bmm(x_NRC, x_NRC.mT, out=gram_NSS) if wide else torch.bmm(x_NRC.mT, x_NRC, out=gram_NSS)
    # The trace is the square of the norm, so the matrices themselves need no pass to be normalised: the two small ones
    # take the factor. Entries whose squares leave the range of fp32 (1e19) are refused with the gradient's norm.
    norm_N11 = gram_NSS.diagonal(dim1=1, dim2=2).sum(1).sqrt_().view(-1, 1, 1)
    scale_N11 = _normalizer(norm_N11, safety)
    gram_NSS.mul_(scale_N11).mul_(scale_N11)
    for number, (a, b, c) in enumerate(COEFFICIENTS[:steps], start=1):
        torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c, out=factor_NSS)
        factor_NSS.diagonal(dim1=1, dim2=2).add_(a)
        if number == 1:
            torch.mul(factor_NSS, scale_N11, out=product_NSS)
        else:
            torch.bmm(factor_NSS, product_NSS, out=spare_NSS)
            product_NSS, spare_NSS = spare_NSS, product_NSS
        if number < steps:
            torch.bmm(factor_NSS, gram_NSS, out=spare_NSS)
            torch.bmm(spare_NSS, factor_NSS, out=gram_NSS)
    result_NRC = workspace.take("next", x_NRC.shape, x_NRC.dtype, x_NRC.device)
    left, right = (product_NSS, x_NRC) if wide else (x_NRC, product_NSS)
    return torch.bmm(left, right, out=result_NRC)


def _small_side(x_NRC: torch.Tensor, workspace: Workspace, count: int) -> tuple[bool, list[torch.Tensor]]:
    """Whether the rows are the smaller side, and ``count`` buffers [N, S, S]."""
    number, rows, cols = x_NRC.shape
    shape = (number, min(rows, cols), min(rows, cols))
    buffers = [workspace.take(f"small {i}", shape, x_NRC.dtype, x_NRC.device) for i in range(count)]
    return rows <= cols, buffers
