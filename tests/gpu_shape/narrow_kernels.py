"""Counts a step as ``planning.paper_step`` does, with a launch in the place of each of torchao's kernels.

Run with that module's arguments. Without a GPU torchao has none of its kernels of fp8_rowwise; here operators of their
shapes, strides and dtypes stand for them, and torch's own product checks what it gets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_vpmoe.planning import paper_step

_E4M3, _FP32 = torch.float8_e4m3fn, torch.float32


def by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=_E4M3), x.new_empty(len(x), 1, dtype=_FP32)


def by_column(x_EKN: Tensor) -> tuple[Tensor, Tensor]:
    experts, k, n = x_EKN.shape
    return x_EKN.new_empty(experts, n, k, dtype=_E4M3).transpose(1, 2), x_EKN.new_empty(experts, 1, n, dtype=_FP32)


def transposed(x_EKN: Tensor) -> tuple[Tensor, Tensor]:
    scales = x_EKN.new_empty(x_EKN.shape[:2], dtype=_FP32)
    return x_EKN.new_empty(x_EKN.shape, dtype=_E4M3).transpose(1, 2), scales


def by_expert(one: Tensor, other: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    narrow = [x.new_empty(x.shape[1], x.shape[0], dtype=_E4M3).t() for x in (one, other)]
    scales = [x.new_empty(x.shape[1] * len(ends), dtype=_FP32) for x in (one, other)]
    return narrow[0], scales[0], narrow[1], scales[1]


def kernels(library: torch.library.Library) -> SimpleNamespace:
    """Each as one operator, which takes tensors alone."""
    found = {}
    for like in (by_row, by_column, transposed, by_expert):
        given = ", ".join(f"Tensor {name}" for name, kind in like.__annotations__.items() if kind == "Tensor")
        back = ", ".join(["Tensor"] * (4 if like is by_expert else 2))
        library.define(f"{like.__name__}({given}) -> ({back})")
        torch.library.register_fake(f"narrow_kernels::{like.__name__}", like, lib=library)
        found[like.__name__] = _of_tensors(getattr(torch.ops.narrow_kernels, like.__name__))
    return SimpleNamespace(**found)


def _of_tensors(operator: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: operator(*(each for each in arguments if isinstance(each, Tensor)))


def main(arguments: list[str]) -> None:
    library = torch.library.Library("narrow_kernels", "DEF")
    run = paper_step._run

    def with_kernels(*of_run: Any) -> None:
        from megatron_vpmoe.model.moe import narrow_rows

        stand_ins = kernels(library)
        narrow_rows._of_torchao = lambda: stand_ins  # type: ignore[assignment]
        narrow_rows.check_format = lambda *_: None  # type: ignore[assignment]
        run(*of_run)

    paper_step._run = with_kernels
    paper_step.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
