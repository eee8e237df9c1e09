"""Activation recomputation: which parts of the forward pass are run again backward instead of being kept.

torch's non-reentrant checkpoint does it, so every output of a recomputed part has a graph (layer 1's values among them,
whose gradient comes from all later layers), and a part may read parameters that are not among its arguments.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


class _Pass(threading.local):
    """Of the recomputed part that this thread runs: whether again, and what was chosen in it."""

    again = False
    kept: dict[object, Tensor] | None = None


_pass = _Pass()


@contextlib.contextmanager
def _running(kept: dict[object, Tensor], *, again: bool) -> Iterator[None]:
    """A recomputed part's pass, the first or one that only recomputes: its tokens have been counted already."""
    before = _pass.again, _pass.kept
    _pass.again, _pass.kept = again or _pass.again, kept
    try:
        yield
    finally:
        _pass.again, _pass.kept = before


def is_recomputing() -> bool:
    """Whether the forward pass that is running is the second one of a recomputed part."""
    return _pass.again


def chosen_once(by: object, choose: Callable[[], Tensor]) -> Tensor:
    """What ``choose`` returns; while a part is recomputed, what it returned to ``by`` in the first pass.

    A choice that hangs on the last bit of a sum, such as a top-k, could fall out differently the second time (a GPU's
    atomic additions have no order), and gradients would then belong to another forward pass than the loss.
    """
    if _pass.kept is None:
        return choose()
    if not (_pass.again and by in _pass.kept):
        _pass.kept[by] = choose()
    return _pass.kept[by]


def recomputed(part: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """``part(*arguments, **keywords)``; of its tensors only the arguments stay until the backward pass.

    Nothing in the model draws random numbers, so no generator's state is kept: reading it waits for the device.
    """
    return cast(
        T,
        checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts, **keywords),
    )


def _contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    kept: dict[object, Tensor] = {}
    return _running(kept, again=False), _running(kept, again=True)


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
