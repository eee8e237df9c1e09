"""Records in which precision a pass computes: every operation that reaches the dispatcher, forward and backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HALF = {torch.bfloat16, torch.float16}

# Nowhere in a pass may one of these take or give half precision, whatever it is used for.
SENSITIVE = {
    "softmax": ("_softmax", "_log_softmax", "logsumexp", "logaddexp", "nll_loss", "cross_entropy"),
    "exponential": ("exp", "exp2", "log", "log2", "log1p", "expm1", "sigmoid"),
    "statistics": ("rsqrt", "sqrt", "reciprocal", "linalg_vector_norm", "norm", "mean", "var", "var_mean", "std"),
    "rotation": ("cos", "sin", "polar"),
    "routing": ("topk", "sort", "kthvalue"),
}
FUSED_ATTENTION = "scaled_dot_product"


def floats(values: object) -> Iterator[Tensor]:
    """Every floating tensor in nested arguments."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def operation(func: torch._ops.OpOverload) -> str:
    """Its name without namespace, overload and the marks of in-place and backward variants."""
    name = func.overloadpacket.__name__
    for ending in ("_backward_data", "_backward", "_forward"):
        name = name.removesuffix(ending)
    return name.rstrip("_")


class PrecisionProbe(TorchDispatchMode):
    """While it is entered, notes every operation on floating tensors and collects what should have been wide.

    Besides the sensitive operations: the products of the router (matrices with ``experts`` columns or rows, a number
    that no other matrix of the model may have), everything that reads a watched tensor, or a cosine or sine, and the
    additive bias and log-sum-exp of a fused attention.

    Attributes:
        seen: kind of operation -> dtypes of its tensors, so that a test can ask that it was there.
        violations: one line each.
    """

    def __init__(self, watched: Mapping[str, Sequence[Tensor]], experts: int) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = defaultdict(set)
        self.violations: list[str] = []
        self._experts = experts
        self._watched = {tensor.data_ptr(): name for name, tensors in watched.items() for tensor in tensors}
        self._alive: list[Tensor] = []  # so that no watched address is given to another tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "aten" in func.namespace:
            self._note(func, list(floats((args, kwargs))), list(floats(out)))
        return out

    def _note(self, func: torch._ops.OpOverload, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = operation(func)
        for kind, names in SENSITIVE.items():
            if name in names:
                self._demand_wide(kind, func, inputs + outputs)
        matrices = [tensor for tensor in inputs if tensor.dim() == 2 and self._experts in tensor.shape]
        if name in ("mm", "addmm", "linear") and matrices:
            self._demand_wide("router product", func, inputs + outputs)
        for tensor in inputs:
            label = self._watched.get(tensor.data_ptr())
            if label is not None:
                # A tensor to write to takes no part in the promotion: what is written there is rounded at the end.
                rounded_at_the_end = func._overloadname == "out" and tensor.dim() > 0
                self._demand_wide(label, func, [tensor] if rounded_at_the_end else [tensor, *outputs])
        if name in ("cos", "sin"):
            for tensor in outputs:
                self._alive.append(tensor)
                self._watched[tensor.data_ptr()] = "cosine or sine"
        if FUSED_ATTENTION in name:
            # Queries, keys, values and the output have a head dimension; log-sum-exp and bias tell the precision.
            width = inputs[0].shape[-1]
            inner = [tensor for tensor in inputs + outputs if tensor.shape[-1] != width]
            self._demand_wide("fused attention", func, inner)

    def _demand_wide(self, kind: str, func: torch._ops.OpOverload, tensors: list[Tensor]) -> None:
        dtypes = {tensor.dtype for tensor in tensors}
        self.seen[kind] |= dtypes
        if dtypes & HALF:
            self.violations.append(f"{kind}: {func} on {sorted(str(dtype) for dtype in dtypes)}")
