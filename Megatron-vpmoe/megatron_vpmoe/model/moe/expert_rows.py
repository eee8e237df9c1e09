"""Which rows each expert computes, and the products of every expert with its own rows, in two layouts.

A row is a token's copy for one of its experts. ``GroupedRows`` are sorted by expert, without gaps: their numbers stay
on the device, and nothing there is waited for. ``PaddedRows`` give every expert as many places as the busiest one has
rows, a number that has to be asked for; they are faster on a CPU with matrix units. Rows are gathered, never added by
index, so that a pass repeats bit for bit.

Shapes: T tokens, K experts a token, E local experts, N = T K rows, P places (N, or padded E times the busiest's), W any
width, O and I output and input width of a weight.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What torch's grouped product computes in; it wants widths of whole 16 bytes."""

PADDED_UP_TO = 2.5
"""With matrix units for bf16: padding to at most so many times the rows is faster (docs/LOG.md, "experts")."""

_ALIGNED_BYTES = 16


class Numbers:
    """int64 numbers on a device, counted up from 0: those of all layers of a pass, each row of them made once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[int, int], Tensor] = {}

    def below(self, end: int, step: int = 1) -> Tensor:
        """0, ``step``, ..., to be read only."""
        if (end, step) not in self._made:
            self._made[end, step] = torch.arange(0, end, step, device=self._device)
        return self._made[end, step]


class GroupedRows:
    """Rows sorted by expert; products by torch's grouped product.

    Args:
        expert_TK: integers, the experts of each token.
        experts: how many there are.
        numbers: shared with other layers; None: its own.
        in_order: the tokens are sorted by their only expert already, and so are rows.
    """

    name = "grouped"

    def __init__(
        self, expert_TK: Tensor, experts: int, numbers: Numbers | None = None, *, in_order: bool = False
    ) -> None:
        tokens, topk = expert_TK.shape
        numbers = numbers or Numbers(expert_TK.device)
        numbers_N = numbers.below(tokens * topk)
        self._expert_N, order_N = expert_TK.flatten(), None
        if not in_order:
            self._expert_N, order_N = self._expert_N.sort(stable=True)
        ids = numbers.below(experts).to(self._expert_N.dtype)
        self._ends_E = torch.searchsorted(self._expert_N, ids, right=True, out_int32=True)
        self._expert_TK, self._experts = expert_TK, experts
        self._starts_T = numbers.below(tokens * topk, topk)
        self.token_P: Tensor | None = None
        self.place_TK = numbers_N.view(tokens, topk)
        if order_N is not None:
            self.token_P = order_N.div(topk, rounding_mode="floor")
            self.place_TK = torch.empty_like(order_N).scatter_(0, order_N, numbers_N).view(tokens, topk)
        self._order_N = order_N

    def gather(self, x_TW: Tensor) -> Tensor:
        """[P, W]: each place's token."""
        return x_TW.contiguous() if self.token_P is None else x_TW.index_select(0, self.token_P)

    def add_up(self, rows_PW: Tensor) -> Tensor:
        """[T, W]: the sum of each token's rows, in fp32 or wider, in the order of its experts."""
        if self.token_P is None:
            return rows_PW
        return functional.embedding_bag(self.place_TK.flatten(), rows_PW, self._starts_T, mode="sum")

    def spread(self, value_TK: Tensor) -> Tensor:
        """[P, 1]: each row's own value; 0 in places without a row."""
        flat = value_TK.flatten()
        return (flat if self._order_N is None else flat.index_select(0, self._order_N)).unsqueeze(1)

    def collect(self, value_P: Tensor) -> Tensor:
        """[T, K]: the value of each token's rows."""
        return value_P.index_select(0, self.place_TK.flatten()).view(self.place_TK.shape)

    def over_experts(self, value_TK: Tensor) -> Tensor:
        """[T, E]: a token's value for each of its experts, else 0."""
        tokens = len(self._expert_TK)
        return value_TK.new_zeros(tokens, self._experts).scatter_(1, self._expert_TK.long(), value_TK)

    def at_experts(self, value_TE: Tensor) -> Tensor:
        """[T, K]: of a value for each expert those of the token's own."""
        return value_TE.gather(1, self._expert_TK.long())

    def linear(self, rows_PI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        """[P, O]: each row times its expert's transposed matrix, plus its expert's bias."""
        out = self._product(rows_PI, weight_EOI.transpose(1, 2))
        return out if bias_EO is None else out.add_(bias_EO.index_select(0, self._expert_N))

    def linear_transposed(self, rows_PO: Tensor, weight_EOI: Tensor) -> Tensor:
        """[P, I]: each row times its expert's matrix."""
        return self._product(rows_PO, weight_EOI)

    def outer(self, left_PW: Tensor, right_PW: Tensor) -> Tensor:
        """[E, W_left, W_right]: for each expert the sum over its rows of left right^T."""
        out = self._product(left_PW.t(), right_PW)
        # Not its capability, of which torch's compiler makes no constant.
        if out.is_cuda and torch.cuda.get_device_properties(out.device).major >= 10:
            # Blackwell's kernel leaves what was in memory where an expert has no row (pytorch issue 172439).
            idle_E = self._ends_E == functional.pad(self._ends_E, (1, 0))[:-1]
            out.masked_fill_(idle_E[:, None, None], 0.0)
        return out

    def total(self, rows_PW: Tensor) -> Tensor:
        """[E, W]: for each expert the sum of its rows."""
        # A product too: summed in fp32 and in a fixed order, which adding by index is not.
        ones = rows_PW.new_ones(len(rows_PW), _ALIGNED_BYTES // rows_PW.element_size())
        return self.outer(ones, rows_PW)[:, 0]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        if not _wider(left):
            return _grouped(left, right, self._ends_E)
        return _grouped(left.float(), right.float(), self._ends_E).to(left.dtype)


class PaddedRows(GroupedRows):
    """Every expert with as many places as the busiest has rows; products in batches. Methods as above."""

    name = "padded"

    def __init__(
        self, expert_TK: Tensor, experts: int, numbers: Numbers | None = None, *, in_order: bool = False
    ) -> None:
        numbers = numbers or Numbers(expert_TK.device)
        super().__init__(expert_TK, experts, numbers, in_order=in_order)
        ends_E = self._ends_E.long()
        begins_E = functional.pad(ends_E, (1, 0))[:-1]
        most = int((ends_E - begins_E).max())
        # The n-th row, sorted, is the (n - begin of its expert)-th of its expert: its place is that, plus e * most.
        shift_E = numbers.below(experts) * most - begins_E
        numbers_N = numbers.below(len(self._expert_N))
        place_N = numbers_N + shift_E.index_select(0, self._expert_N.long())
        tokens = numbers_N if self.token_P is None else self.token_P
        # Places without a row compute the first token again, with a weight of 0, and nobody reads them.
        self.token_P = tokens.new_zeros(experts * most).scatter_(0, place_N, tokens)
        self.place_TK = place_N.index_select(0, self.place_TK.flatten()).view(self.place_TK.shape)

    def spread(self, value_TK: Tensor) -> Tensor:
        assert self.token_P is not None
        places = value_TK.new_zeros(len(self.token_P))
        return places.scatter_(0, self.place_TK.flatten(), value_TK.flatten()).unsqueeze(1)

    def linear(self, rows_PI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        rows, weight = self._by_expert(rows_PI), weight_EOI.transpose(1, 2)
        out = torch.bmm(rows, weight) if bias_EO is None else torch.baddbmm(bias_EO.unsqueeze(1), rows, weight)
        return out.flatten(0, 1)

    def linear_transposed(self, rows_PO: Tensor, weight_EOI: Tensor) -> Tensor:
        return torch.bmm(self._by_expert(rows_PO), weight_EOI).flatten(0, 1)

    def outer(self, left_PW: Tensor, right_PW: Tensor) -> Tensor:
        return torch.bmm(self._by_expert(left_PW).transpose(1, 2), self._by_expert(right_PW))

    def total(self, rows_PW: Tensor) -> Tensor:
        return self._by_expert(rows_PW).sum(1)

    def _by_expert(self, rows_PW: Tensor) -> Tensor:
        return rows_PW.view(self._experts, -1, rows_PW.shape[1])


def _grouped(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """Torch's grouped product, of whose shapes its compiler knows those in bf16 alone."""
    if torch.compiler.is_compiling() and left.dtype != torch.bfloat16:
        return _grouped_by_name(left, right, ends_E)
    return functional.grouped_mm(left, right, offs=ends_E)


@torch.library.custom_op("vpmoe::grouped_product", mutates_args=())
def _grouped_by_name(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    return functional.grouped_mm(left, right, offs=ends_E)


@_grouped_by_name.register_fake
def _(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    shape = (len(ends_E), *left.shape[:1]) if right.dim() == 2 else left.shape[:1]
    return left.new_empty(*shape, right.shape[-1])


def layout_of(
    expert_TK: Tensor, experts: int, dtype: torch.dtype, numbers: Numbers | None = None, *, in_order: bool = False
) -> GroupedRows:
    """The rows in the faster layout for these loads; padded where the grouped product does not know ``dtype``.

    On a GPU always grouped: loads are skewed there, memory is dear, and to ask for a load is to wait for the device.
    So in what is compiled, which can ask for nothing.
    """
    layout = GroupedRows
    if dtype not in GROUPED_DTYPES:
        layout = PaddedRows
    elif not torch.compiler.is_compiling() and expert_TK.device.type == "cpu" and _pads(dtype):
        most = int(torch.bincount(expert_TK.flatten(), minlength=experts).max())
        layout = PaddedRows if experts * most <= PADDED_UP_TO * expert_TK.numel() else GroupedRows
    return layout(expert_TK, experts, numbers, in_order=in_order)


def layout_rule(dtype: torch.dtype, device_type: str, *, compiled: bool = False) -> str:
    """How ``layout_of`` chooses, for the log of a run."""
    if dtype not in GROUPED_DTYPES:
        return f"padded batches ({dtype} has no grouped product)"
    if device_type == "cpu" and dtype == torch.bfloat16:
        if not compiled and _pads(dtype):
            return f"padded batches while padding makes at most {PADDED_UP_TO:g} times the rows, else grouped products"
        return "grouped products" if _multiplies_bf16() else "grouped products in fp32, as this CPU has none in bf16"
    return "grouped products"


def _wider(x: Tensor) -> bool:
    """Whether products are to be made in fp32: a CPU without instructions for bf16 takes many times longer there."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _multiplies_bf16()


def _pads(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and _matrix_units()


def _matrix_units() -> bool:
    return cast(bool, torch.cpu._is_amx_tile_supported())


def _multiplies_bf16() -> bool:
    return cast(bool, torch.cpu._is_avx512_bf16_supported())
