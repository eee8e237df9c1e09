"""The experts' products in a narrow format: rows in blocks of places, converted and multiplied by torchao's functions.

Every product of the forward pass and both of the backward pass round their two operands to e4m3, with scales along the
sum that the product makes, and add up in fp32. On a card torchao's kernels convert and torch multiplies the narrow
numbers. On a CPU the rounded numbers, which bf16 holds exactly, are multiplied in bf16: the format's numerics, and none
of its speed. The sums for biases, the router's weights and all else stay as they are in ``GroupedRows``.

Shapes as in ``expert_rows``; P places are those of ``ExpertFormat.places``, whatever the router chose.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.config.expert_formats import FORMATS, ExpertFormat
from megatron_vpmoe.model.moe.expert_rows import GroupedRows, Numbers, PaddedRows
from megatron_vpmoe.runtime.expert_formats import TORCHAO, check_format

_E4M3 = torch.float8_e4m3fn


class BlockRows(GroupedRows):
    """Rows sorted by expert, each expert's filled up to whole blocks, one at least; products as ``GroupedRows``.

    A place without a row repeats its expert's last one, with a weight of 0: so it adds nothing, and no scale depends on
    it. What lies behind the last expert's block is in no product and read by nobody. Nothing is waited for.

    Args:
        expert_TK: integers, the experts of each token.
        experts: how many there are.
        wanted: whose blocks.
        numbers: shared with other layers; None: its own.
        in_order: the tokens are sorted by their only expert already.
    """

    def __init__(
        self,
        expert_TK: Tensor,
        experts: int,
        wanted: ExpertFormat,
        numbers: Numbers | None = None,
        *,
        in_order: bool = False,
    ) -> None:
        numbers = numbers or Numbers(expert_TK.device)
        super().__init__(expert_TK, experts, numbers, in_order=in_order)
        ends_E, of_blocks = self._ends_E, wanted.rows - 1
        begins_E = functional.pad(ends_E, (1, 0))[:-1]
        rows_E = (ends_E - begins_E).clamp_(min=1)
        places_E = rows_E.add_(of_blocks).bitwise_and_(~of_blocks)  # blocks are powers of two
        places_end_E = places_E.cumsum(0)
        shift_E = places_end_E - places_E - begins_E
        place_P = numbers.below(wanted.places(expert_TK.numel(), experts))
        self._expert_P = torch.searchsorted(places_end_E[:-1], place_P, right=True)
        last_P, shift_P = (of_E.index_select(0, self._expert_P) for of_E in (ends_E - 1, shift_E))
        row_P = torch.minimum(place_P - shift_P, last_P).clamp_(min=0)  # an expert without rows has another's
        self.token_P = row_P if self.token_P is None else self.token_P.index_select(0, row_P)
        self.place_TK = self.place_TK + shift_E.index_select(0, expert_TK.flatten()).view(expert_TK.shape)
        self._ends_E = places_end_E.int()

    @property
    def on_card(self) -> bool:
        """Whether kernels of a card make the products; else the format is emulated."""
        return self._ends_E.is_cuda

    spread = PaddedRows.spread  # places have gaps there as here

    def linear(self, rows_PI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        out = self._linear(rows_PI, weight_EOI)
        return out if bias_EO is None else out.add_(bias_EO.index_select(0, self._expert_P))

    def total(self, rows_PW: Tensor) -> Tensor:
        ones = rows_PW.new_ones(len(rows_PW), 16 // rows_PW.element_size())
        return self._product(ones.t(), rows_PW)[:, 0]  # no expert is without a block, so none is left out

    def _linear(self, rows_PI: Tensor, weight_EOI: Tensor) -> Tensor:
        return self._product(rows_PI, weight_EOI.transpose(1, 2))


class Float8Rows(BlockRows):
    """e4m3 with one scale for each row of the left operand and each column of the right one, rounded to powers of two.

    Of the weights' gradient, whose sum is over an expert's rows, the scales are each expert's own.
    """

    name = "fp8_rowwise"

    def _linear(self, rows_PI: Tensor, weight_EOI: Tensor) -> Tensor:
        weight_EIO = weight_EOI.transpose(1, 2)
        if not self.on_card:
            return self._product(_emulated(rows_PI, -1), _emulated(weight_EIO, -2))
        left = _of_torchao().by_row(rows_PI, _E4M3, True)
        return self._scaled(*left, *_of_torchao().by_column(weight_EIO, _E4M3, True))

    def linear_transposed(self, rows_PO: Tensor, weight_EOI: Tensor) -> Tensor:
        if not self.on_card:
            return self._product(_emulated(rows_PO, -1), _emulated(weight_EOI, -2))
        left = _of_torchao().by_row(rows_PO, _E4M3, True)
        return self._scaled(*left, *_of_torchao().transposed(weight_EOI.transpose(1, 2), _E4M3, True))

    def outer(self, left_PW: Tensor, right_PW: Tensor) -> Tensor:
        if not self.on_card:
            return self._product(self._emulated_by_expert(left_PW).t(), self._emulated_by_expert(right_PW))
        left, of_left, right, of_right = _of_torchao().by_expert(left_PW, right_PW, self._ends_E, _E4M3, True)
        return self._scaled(left.t(), of_left, right, of_right)

    def _scaled(self, left: Tensor, of_left: Tensor, right: Tensor, of_right: Tensor) -> Tensor:
        """The product of what was multiplied by ``of_left`` and ``of_right`` as it was narrowed, in bf16."""
        experts = len(self._ends_E)
        of_left = of_left.flatten()
        of_right = of_right.flatten() if right.ndim == 2 else of_right.reshape(experts, -1)
        # torch's private name is what torchao calls, in these words, and what its tests hold.
        return torch._scaled_grouped_mm(  # pyright: ignore[reportPrivateImportUsage]
            left,
            right,
            of_left.reciprocal(),
            of_right.reciprocal(),
            self._ends_E,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def _emulated_by_expert(self, rows_PW: Tensor) -> Tensor:
        narrow, scales = _of_torchao().by_expert_emulated(rows_PW, self._ends_E, _E4M3, True)
        scale_PW = scales.view(len(self._ends_E), -1).index_select(0, self._expert_P)
        return (narrow.float() / scale_PW).to(rows_PW.dtype)


class MxRows(BlockRows):
    """e4m3 with one power of two for each 32 values along the sum, rounded up (OCP Microscaling 1.0's MXFP8)."""

    name = "mxfp8"
    _BLOCK = 32

    def _linear(self, rows_PI: Tensor, weight_EOI: Tensor) -> Tensor:
        return self._converted("mx_forward", rows_PI, weight_EOI.transpose(1, 2))

    def linear_transposed(self, rows_PO: Tensor, weight_EOI: Tensor) -> Tensor:
        return self._converted("mx_of_input", rows_PO, weight_EOI.transpose(1, 2))

    def outer(self, left_PW: Tensor, right_PW: Tensor) -> Tensor:
        # False: in the format as well, not in the operands' own precision.
        return self._converted("mx_of_weight", left_PW, right_PW, False).transpose(1, 2)

    def _converted(self, which: str, left: Tensor, right: Tensor, *more: bool) -> Tensor:
        ao = _of_torchao()
        options = (self._BLOCK, torch.bfloat16, ao.round_up, *more)
        return getattr(ao, which)(left, right, self._ends_E, *options, ao.kernels if self.on_card else ao.emulated)


_LAYOUTS: dict[str, type[BlockRows]] = {layout.name: layout for layout in (Float8Rows, MxRows)}


def narrow_rows(
    precision: str,
    expert_TK: Tensor,
    experts: int,
    numbers: Numbers | None = None,
    *,
    hidden: int,
    ffn: int,
    in_order: bool = False,
) -> BlockRows:
    """The rows of a format of ``FORMATS``; raises what ``check_format`` does. Arguments as ``BlockRows`` has them."""
    on_card = expert_TK.is_cuda
    check_format(precision, hidden, ffn, torch.cuda.get_device_capability(expert_TK.device) if on_card else None)
    return _LAYOUTS[precision](expert_TK, experts, FORMATS[precision], numbers, in_order=in_order)


def narrow_rule(precision: str, device_type: str) -> str:
    """What becomes of ``moe.experts_precision`` here, for the log of a run."""
    if device_type == "cpu":
        return f"{precision} EMULATED (rounded by torchao {TORCHAO}, multiplied in bf16), as this machine has no GPU"
    return f"grouped products in {precision} (torchao {TORCHAO})"


def _emulated(x: Tensor, along: int) -> Tensor:
    """x as e4m3 with one scale for all values along a dimension would hold it, in the dtype of x."""
    ao = _of_torchao()
    scale = ao.scale(x, _E4M3, scaling_granularity=ao.axiswise, axiswise_dim=along, round_scales_to_power_of_2=True)
    return (ao.narrowed(x.float() * scale, _E4M3).float() / scale).to(x.dtype)


@functools.cache
def _of_torchao() -> SimpleNamespace:
    """The functions of torchao that are called, imported when the first product is made."""
    with _quiet():
        from torchao.float8.config import ScalingGranularity
        from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
        from torchao.prototype.moe_training import kernels, mxfp8_grouped_mm, utils
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.quantization.quantize_.common import KernelPreference
    return SimpleNamespace(
        by_row=kernels.triton_fp8_rowwise_2d_scale_and_cast,
        by_column=kernels.triton_fp8_colwise_3d_scale_and_cast,
        transposed=kernels.triton_fp8_rowwise_3d_transpose_rhs,
        by_expert=kernels.triton_fp8_per_group_colwise_scales_dual,
        by_expert_emulated=utils.torch_to_float8_per_group_colwise,
        scale=tensor_to_scale,
        axiswise=ScalingGranularity.AXISWISE,
        narrowed=to_fp8_saturated,
        mx_forward=mxfp8_grouped_mm._compute_fwd,
        mx_of_input=mxfp8_grouped_mm._compute_dgrad,
        mx_of_weight=mxfp8_grouped_mm._compute_wgrad,
        round_up=ScaleCalculationMode.RCEIL,
        kernels=KernelPreference.AUTO,
        emulated=KernelPreference.EMULATED,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """On a CPU torchao warns that its kernels for cards cannot be loaded, and of names that torch will rename."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers if not torch.cuda.is_available() else ():
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
