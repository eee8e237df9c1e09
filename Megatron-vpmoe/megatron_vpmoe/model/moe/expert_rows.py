"""Products of each expert with its own rows, in two layouts behind one interface, and the rule that chooses.

``GroupedRows`` leaves the rows as they come, sorted by expert, and hands them to torch's grouped GEMM. ``PaddedRows``
gives every expert as many rows as the busiest one has and hands them to batched matrix products: more arithmetic, but
arithmetic that runs faster. What an expert computes is written once, over either.

Shapes: E local experts, N rows (tokens times top-k), M rows of the busiest expert, W any width, O and I output and
input width of a weight. "Rows" below are [N, W] when grouped and [E, M, W] when padded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PADDED_UP_TO = {torch.float32: 1.25, torch.bfloat16: 2.5}
"""On a CPU: padding to at most this many times the rows is faster than grouped GEMM (docs/LOG.md, "experts")."""

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What torch's grouped GEMM computes in."""

ALIGNED_BYTES = 16
"""Grouped GEMM wants rows of whole multiples of this."""


class GroupedRows:
    """Rows as they come; products by torch's grouped GEMM. It wants widths of whole 16 bytes."""

    name = "grouped"

    def __init__(self, tokens_per_expert: Tensor, device: torch.device) -> None:
        self.sizes: list[int] = tokens_per_expert.tolist()
        self.counts = tokens_per_expert.to(device)
        self.offsets = self.counts.cumsum(0).to(torch.int32)
        self.expert_N = torch.repeat_interleave(self.counts, output_size=sum(self.sizes))

    def enter(self, x_NW: Tensor) -> Tensor:
        """Rows sorted by expert -> rows in this layout; added ones are zero."""
        return x_NW.contiguous()

    def leave(self, rows: Tensor) -> Tensor:
        """Rows in this layout -> [N, W] sorted by expert."""
        return rows

    def linear(self, rows: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        """Each row times its expert's transposed matrix, plus its expert's bias: width I -> O."""
        out = functional.grouped_mm(rows, weight_EOI.transpose(1, 2), offs=self.offsets)
        return out if bias_EO is None else out.add_(self.spread(bias_EO))

    def linear_transposed(self, rows: Tensor, weight_EOI: Tensor) -> Tensor:
        """Each row times its expert's matrix: width O -> I."""
        return functional.grouped_mm(rows, weight_EOI, offs=self.offsets)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """[E, W_left, W_right]: for each expert the sum over its rows of left_n right_n^T."""
        return functional.grouped_mm(left.t(), right, offs=self.offsets)

    def spread(self, bias_EW: Tensor) -> Tensor:
        """Each row's expert's bias, shaped to broadcast against rows."""
        return bias_EW.index_select(0, self.expert_N)

    def dot(self, rows: Tensor, vector_EW: Tensor) -> Tensor:
        """Each row times its expert's vector: width W -> 1."""
        if rows.is_cuda or rows.dtype != torch.float32:
            return (rows * self.spread(vector_EW)).sum(-1, keepdim=True)
        # A quarter of the time: no [N, W] of spread vectors, none of products. In bf16 such products are slow on a CPU.
        parts = zip(rows.split(self.sizes), vector_EW.unsqueeze(2).unbind(), strict=True)
        return torch.cat([part @ vector for part, vector in parts])

    def total(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """[E, W]: for each expert the sum of its rows, each times its weight ([N, 1] or [E, M, 1])."""
        # A product too: summed in fp32 and in a fixed order, which adding by index is not.
        column = rows.new_ones(len(rows), 1) if weight is None else weight.to(rows.dtype)
        return self.outer(column.expand(-1, ALIGNED_BYTES // rows.element_size()).contiguous(), rows)[:, 0]


class PaddedRows:
    """Every expert with the rows of the busiest one, by batched products; methods as in ``GroupedRows``."""

    name = "padded"

    def __init__(self, tokens_per_expert: Tensor, device: torch.device) -> None:
        counts = tokens_per_expert.to(device)
        self.experts, self.rows = len(tokens_per_expert), int(tokens_per_expert.max())
        total = int(tokens_per_expert.sum())
        # Row n of the sorted rows is the (n - begin of its expert)-th of its expert: its place is that, plus e * M.
        shift_E = torch.arange(self.experts, device=device) * self.rows - (counts.cumsum(0) - counts)
        self.place_N = torch.arange(total, device=device) + torch.repeat_interleave(shift_E, counts, output_size=total)

    def enter(self, x_NW: Tensor) -> Tensor:
        padded = x_NW.new_zeros(self.experts * self.rows, x_NW.shape[1])
        return padded.index_copy_(0, self.place_N, x_NW).view(self.experts, self.rows, -1)

    def leave(self, rows: Tensor) -> Tensor:
        return rows.flatten(0, 1).index_select(0, self.place_N)

    def linear(self, rows: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        if bias_EO is None:
            return torch.bmm(rows, weight_EOI.transpose(1, 2))
        return torch.baddbmm(bias_EO.unsqueeze(1), rows, weight_EOI.transpose(1, 2))

    def linear_transposed(self, rows: Tensor, weight_EOI: Tensor) -> Tensor:
        return torch.bmm(rows, weight_EOI)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.transpose(1, 2), right)

    def spread(self, bias_EW: Tensor) -> Tensor:
        return bias_EW.unsqueeze(1)

    def dot(self, rows: Tensor, vector_EW: Tensor) -> Tensor:
        return torch.bmm(rows, vector_EW.unsqueeze(2))

    def total(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        return rows.sum(1) if weight is None else torch.bmm(weight.to(rows.dtype).transpose(1, 2), rows).squeeze(1)


ExpertRows = GroupedRows | PaddedRows


def choose_layout(tokens_per_expert: Tensor, dtype: torch.dtype, device_type: str) -> type[ExpertRows]:
    """The faster layout for these loads; padding where grouped GEMM cannot compute in ``dtype`` at all.

    On a GPU always grouped: the loads are skewed there and memory is dear.
    """
    if dtype not in GROUPED_DTYPES:
        return PaddedRows
    rows, padded = int(tokens_per_expert.sum()), len(tokens_per_expert) * int(tokens_per_expert.max())
    if device_type == "cpu" and 0 < padded <= PADDED_UP_TO.get(dtype, 0.0) * rows:
        return PaddedRows
    return GroupedRows


def layout_rule(dtype: torch.dtype, device_type: str) -> str:
    """``choose_layout`` in words, for the log of a run."""
    if dtype not in GROUPED_DTYPES:
        return f"padded bmm ({dtype} has no grouped GEMM)"
    if device_type == "cpu" and dtype in PADDED_UP_TO:
        return f"padded bmm while padding makes at most {PADDED_UP_TO[dtype]:g} times the rows, else grouped GEMM"
    return "grouped GEMM"
