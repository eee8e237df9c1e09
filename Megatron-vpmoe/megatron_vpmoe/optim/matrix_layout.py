"""Which logical matrices a parameter holds.

A parameter is one matrix [out, in], several matrices fused along its rows (``param.matrix_rows``), or a stack of
experts [E, out, in], each one matrix or several of equal height fused likewise: that is a higher stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.optim.polar_express import choose_iteration, polar_express_flops

Run = tuple[int, int]
"""First row and number of rows of a contiguous piece of a matrix."""


class MatrixLayout(NamedTuple):
    """The logical matrices of one parameter."""

    matrices: tuple[tuple[Run, ...], ...]
    """Row runs of each matrix of a 2-D parameter, in order; empty for a 3-D one."""
    stacked: int
    """Matrices of a 3-D parameter: E, or E times those that an expert's rows fuse; else 0."""
    routed: bool
    """Whether tokens are routed here, so that a step can pass without any."""
    split: int | None = None
    """The dimension that tensor-parallel ranks split: 0 rows, 1 columns; None: this rank has whole matrices."""

    @property
    def count(self) -> int:
        """How many logical matrices there are."""
        return self.stacked or len(self.matrices)

    def unfused(self, x: torch.Tensor) -> torch.Tensor:
        """What is laid out like the parameter (any last dimension); of a 3-D one a view with a matrix an entry."""
        return x.view(self.stacked, -1, x.shape[-1]) if x.ndim == 3 and len(x) != self.stacked else x


def matrix_layout(param: torch.Tensor, name: str = "a parameter", *, tensor_parallel: bool = False) -> MatrixLayout:
    """Read the layout of ``param`` from its dimensions and its attributes ``matrix_rows`` and ``allreduce``.

    Args:
        param: this rank's.
        name: for the error.
        tensor_parallel: there are several tensor-parallel ranks, so that Megatron's ``tensor_model_parallel`` and
            ``partition_dim`` tell whether this is a part.

    Raises:
        ConfigError: ``param`` is neither 2-D nor 3-D, or ``matrix_rows`` does not hold each row exactly once; of a 3-D
            one, in order and in matrices of equal height.
    """
    routed = param.ndim == 3 or not getattr(param, "allreduce", True)
    if param.ndim not in (2, 3):
        raise ConfigError(
            f"{name} has shape {tuple(param.shape)}, which NorMuon cannot orthogonalise",
            remedy="give it to AdamW: NorMuon takes [out, in] and [experts, out, in]",
        )
    groups: Iterable[torch.Tensor | slice] = getattr(param, "matrix_rows", (slice(None),))
    rows = torch.arange(param.shape[-2])
    selected = [rows[group] if isinstance(group, slice) else group.cpu().long() for group in groups]
    if not torch.equal(torch.cat(selected).sort().values, rows):
        raise ConfigError(
            f"matrix_rows of {name} names {sum(len(s) for s in selected)} rows of {param.shape[-2]}",
            remedy="every row belongs to exactly one logical matrix",
        )
    if param.ndim == 3:
        if len({len(s) for s in selected}) > 1 or not torch.equal(torch.cat(selected), rows):
            raise ConfigError(
                f"matrix_rows of {name} are of {', '.join(str(len(s)) for s in selected)} rows or out of order",
                remedy="the matrices that an expert fuses are equally high and lie one after another",
            )
        return MatrixLayout((), param.shape[0] * len(selected), routed)
    is_part = tensor_parallel and getattr(param, "tensor_model_parallel", False)
    split = getattr(param, "partition_dim", None) if is_part else None
    return MatrixLayout(tuple(_runs(s.tolist()) for s in selected), 0, routed, split)


def layout_flops(
    layout: MatrixLayout, shape: Sequence[int], dtype: torch.dtype, steps: int = 5, tensor_parallel: int = 1
) -> int:
    """Operations of Polar Express over all matrices of a parameter of ``shape``, computed in ``dtype``.

    Of matrices that ``tensor_parallel`` ranks split, each takes its share whole: what a rank has to do of them.
    """
    split = {} if layout.split is None else {layout.split: tensor_parallel}
    cols, ranks = shape[-1] * split.get(1, 1), max(split.values(), default=1)
    rows = [height(runs) for runs in layout.matrices] or [math.prod(shape[:2]) // layout.stacked] * layout.stacked
    whole = [count * split.get(0, 1) for count in rows]
    return sum(polar_express_flops(r, cols, steps, choose_iteration(r, cols, dtype, steps)) for r in whole) // ranks


def _runs(rows: list[int]) -> tuple[Run, ...]:
    """Split a list of row indices into maximal runs of consecutive ones, keeping the order."""
    starts = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1] + 1]
    return tuple((rows[i], end - i) for i, end in zip(starts, [*starts[1:], len(rows)], strict=True))


def height(runs: tuple[Run, ...]) -> int:
    """Rows of a matrix."""
    return sum(length for _, length in runs)
