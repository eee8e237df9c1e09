"""What one ATen operation costs a GPU: kernels launched, floating-point operations, bytes read and written.

Of CUDA kernels of the pinned torch (ATen/native/cuda). Bytes are those that have to move if no cache helps: every input
and output once, of a row-wise lookup only the rows that are looked up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves


class Cost(NamedTuple):
    """Of one operation: kernels; multiplications and additions of matrix products; bytes."""

    launches: int
    flops: int = 0
    read: int = 0
    written: int = 0


NOTHING = Cost(0)

_FREE = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
    "record_stream", "scalar_tensor", "_local_scalar_dense", "resize_", "set_", "_unsafe_view",
}  # fmt: skip
# More than one kernel: what is sorted or selected takes several passes, a reduction over rows a second one.
_KERNELS = {
    "_fused_rms_norm_backward": 2,
    "_grouped_mm": 2,  # it writes the addresses of its problems first
    "_unique2": 8,
    "bincount": 3,
    "cumsum": 2,
    "embedding_dense_backward": 8,
    "index_put": 1,
    "masked_select": 4,
    "nonzero": 4,
    "repeat_interleave": 2,
    "sort": 4,
}
_MULTI_TENSOR_CHUNK, _MULTI_TENSOR_BLOCKS = 65536, 320
_MULTI_TENSOR_LISTS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_CAT_TENSORS = 128
_PRODUCTS = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "baddbmm": 1}  # where the first factor stands
_LOOKUPS = {"embedding", "gather", "index", "index_select"}
_PLACED = {"copy", "index_add", "index_copy", "index_put", "scatter", "scatter_add"}  # of the target its rows alone
_OVERWRITTEN = {"copy", "fill", "zero", "normal", "uniform", "_foreach_copy", "_foreach_zero"}


def cost(function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Cost:
    """Of an operation on a GPU, whose tensors may be fake ones."""
    name = operation(function)
    if function.is_view or name in _FREE or function.namespace == "prim":
        return NOTHING
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
    targets = [leaf for key in _written(function) for leaf in _tensors(given.get(key))]
    if name.startswith("_foreach_"):
        outputs = targets or outputs
    elif name == "_fused_adamw":  # each parameter with its gradient and moments; gradients are told to be written too
        outputs = _tensors(given["self"])
        targets = [leaf for key in ("self", "exp_avgs", "exp_avg_sqs") for leaf in _tensors(given[key])]
    if not any(tensor.numel() for tensor in (*outputs, *targets)):
        return NOTHING
    pure = {id(tensor) for tensor in _tensors(given.get("out"))}
    if name in _OVERWRITTEN or name in _PLACED:
        pure |= {id(tensor) for tensor in targets}
    inputs = [tensor for value in given.values() for tensor in _tensors(value) if id(tensor) not in pure]
    written = sum(map(moved, targets or outputs))
    read = sum(map(moved, inputs))
    if name in _LOOKUPS:
        read = written + sum(moved(tensor) for tensor in inputs if not tensor.is_floating_point())
    elif name in _PLACED:
        written = min(written, max((moved(tensor) for tensor in inputs), default=written))
    return Cost(_launches(name, given, inputs, outputs), _flops(name, args), read, written)


def operation(function: Any) -> str:
    """The operation's name without its overload and the mark of writing in place."""
    name: str = function._schema.name.split("::")[-1]
    return name if name in _FREE else name.rstrip("_")


@functools.cache
def _written(function: Any) -> tuple[str, ...]:
    arguments = function._schema.arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)] if isinstance(value, (list, tuple)) else []


def moved(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; of one that repeats some by a stride of 0, of those that exist."""
    count = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return count * tensor.element_size()


def _launches(name: str, given: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]) -> int:
    if name.startswith(("_foreach_", "_fused_adam")):
        listed = [key for key, value in given.items() if isinstance(value, (list, tuple)) and _tensors(value)]
        lists = max(1, len([key for key in listed if key != "state_steps"]))
        chunks = sum(-(-tensor.numel() // _MULTI_TENSOR_CHUNK) for tensor in outputs)
        by_lists = -(-len(outputs) // _MULTI_TENSOR_LISTS[min(lists, 5)])
        return max(by_lists, -(-chunks // _MULTI_TENSOR_BLOCKS)) + (name == "_foreach_norm") * by_lists
    if name == "cat":
        return -(-len(inputs) // _CAT_TENSORS)
    if name == "topk":  # the best of each row are selected, then put in order
        return 1 + bool(given.get("sorted", True))
    copied = 0
    if name in ("addmm", "baddbmm"):  # a product is added in place; a vector joins in the product's own kernel
        added, target = inputs[0], given.get("out", outputs[0])
        copied = int(added is not given.get("out") and added.dim() > 1 and target is not added)
    return _KERNELS.get(name, 1) + copied


def _flops(name: str, args: Sequence[Any]) -> int:
    if (first := _PRODUCTS.get(name)) is None:
        return 0
    left, right = args[first], args[first + 1]
    if name == "_grouped_mm" and left.dim() == right.dim() == 2:  # for each group an outer product over its own rows
        return 2 * left.shape[0] * left.shape[1] * right.shape[1]
    return 2 * math.prod(left.shape) * right.shape[-1]
