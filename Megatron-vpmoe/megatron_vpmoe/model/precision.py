"""What stays fp32 in a bf16 model: parameters and buffers that bf16 could not move, such as a scale near 1; sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter


def fp32_island(initial: Tensor) -> Parameter:
    """A parameter that no cast narrows: it declares ``keep_fp32``."""
    parameter = Parameter(initial.float())
    parameter.keep_fp32 = True  # type: ignore[attr-defined]
    return parameter


def without_narrowing(fn: Callable[[Tensor], Tensor], kept: Iterable[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """``fn``, as ``Module._apply`` takes it, except that it moves the tensors of ``kept`` without narrowing them."""
    ids = {id(tensor) for tensor in kept}

    def careful(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        narrowed = applied.dtype.itemsize < tensor.dtype.itemsize
        return tensor.to(applied.device) if narrowed and id(tensor) in ids else applied

    return careful


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast every floating parameter to ``dtype``, except those that declare ``keep_fp32``; buffers stay as they are."""
    for parameter in model.parameters():
        wanted = torch.float32 if getattr(parameter, "keep_fp32", False) else dtype
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)


def multiplies_narrow(x: Tensor, wide: torch.dtype) -> bool:
    """Whether the device multiplies x as it is and adds up in ``wide``: a GPU bf16, in fp32."""
    return x.is_cuda and x.dtype == torch.bfloat16 and wide == torch.float32


def wide_product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """left right in ``wide``, of matrices of one narrower dtype."""
    if multiplies_narrow(left, wide):
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)
