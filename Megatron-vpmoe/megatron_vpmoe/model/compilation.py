"""Parts of a layer that are compiled where ``training.compile`` asks for it: what reads and gives tensors alone.

A part is a method of a module, compiled once for all modules of one shape and all batches of one size: documents,
positions and masks are tensors, or stay outside. It is compiled whole; what the compiler cannot take in is an error.
Types, names and checkpoints stay as they are. Of a decoding step (``generation.compiled_step``) rows and columns vary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_vpmoe.runtime import pulse

F = TypeVar("F", bound=Callable[..., Any])

_GRAPHS = 64
"""Layers differ in a handful of ways; torch gives up after eight."""


def part(method: F, compiled: bool) -> F:
    """``method``, or what it compiles to: to be called with its module."""
    return _compiled(method) if compiled else method


def of_any_rows(*tensors: Tensor) -> None:
    """Let a part that is called with these be compiled for any length of their first dimension; one row is apart."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def of_any_columns(stored: Tensor) -> None:
    """The same for the first two dimensions, of a tensor that grows as texts do."""
    of_any_rows(stored)
    torch._dynamo.maybe_mark_dynamic(stored, 1)


@functools.cache
def _compiled(method: F) -> F:
    pulse.compilations_are_signs()
    return torch.compile(method, fullgraph=True, dynamic=False, recompile_limit=_GRAPHS)  # type: ignore[return-value]
