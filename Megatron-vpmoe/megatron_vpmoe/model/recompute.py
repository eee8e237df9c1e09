"""Activation recomputation: which parts of the forward pass are run again backward instead of being kept.

torch's non-reentrant checkpoint does it, so every output of a recomputed part has a graph (layer 1's values among them,
whose gradient comes from all later layers), and a part may read parameters that are not among its arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

_again = False


@contextlib.contextmanager
def recomputation() -> Iterator[None]:
    """Mark a forward pass that only recomputes activations: its tokens have been counted already."""
    global _again
    before, _again = _again, True
    try:
        yield
    finally:
        _again = before


def is_recomputing() -> bool:
    """Whether the forward pass that is running is the second one of a recomputed part."""
    return _again


def recomputed(part: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """``part(*arguments, **keywords)``; of its tensors only the arguments stay until the backward pass."""
    return cast(T, checkpoint(part, *arguments, use_reentrant=False, context_fn=_contexts, **keywords))


def _contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    return contextlib.nullcontext(), recomputation()


@dataclass(frozen=True)
class Recomputation:
    """What to recompute; the fields are Megatron's.

    Attributes:
        granularity: None, "selective" (parts of every layer) or "full" (whole layers).
        method: of "full": "uniform" recomputes all layers, in runs of ``num_layers``, keeping the input of each run;
            "block" recomputes the first ``num_layers`` layers of the stack one by one and keeps all of the others.
        num_layers: see ``method``.
        modules: of "selective": any of core_attn, mlp, moe, shared_experts.
    """

    granularity: str | None = None
    method: str = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ()

    def recomputes(self, module: str) -> bool:
        """Whether the part ``module`` of every layer is to be recomputed."""
        return self.granularity == "selective" and module in self.modules

    def runs(self, layers: Sequence[T]) -> list[tuple[Sequence[T], bool]]:
        """The layers of a stack in order, cut into runs, each with whether it is recomputed as one."""
        if self.granularity != "full":
            return [(layers, False)]
        if self.method == "uniform":
            return [(layers[i : i + self.num_layers], True) for i in range(0, len(layers), self.num_layers)]
        single: list[tuple[Sequence[T], bool]] = [(layers[i : i + 1], True) for i in range(len(layers))]
        return [*single[: self.num_layers], (layers[self.num_layers :], False)]
