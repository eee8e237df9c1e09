"""Linears and norms of a few rows: what a step is made of.

In fp32 on a CPU a large weight goes by oneDNN, which reads it in 0.4 to 0.8 of the time of torch's own (MKL) on an AMD;
laid out for it once (``packed``) in 0.3 to 0.6, at any number of rows. Whether it does depends on the weight alone and
not on the rows. The pass over prompts is computation: 226 against 99 GFLOP/s a core.

Shapes: B rows, K inputs, N outputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from megatron_vpmoe.model.norm import RMSNorm, rms_norm

_ONEDNN_FROM = 1 << 17
"""Weights below: oneDNN's overhead of 10 µs a call is more than it saves."""

_ROWS = 16
"""Rows that a layout is asked for; 8 and 32 give as fast a one, also for a single row, and 1 a slower one."""

# Private operators of the pinned torch; a test holds their results to those of torch's own linear.
_onednn = torch.ops.mkldnn._linear_pointwise.default
_pack = torch.ops.mkldnn._reorder_linear_weight.default


class Linear:
    """x Wᵀ + b for a weight that does not change while this lives.

    Args:
        weight: [N, K].
        bias: [N].
        packed: a copy of a large weight is kept in oneDNN's own layout; making it takes as long as two dozen steps
            save.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, packed: bool) -> None:
        weight = weight.detach()
        self._by_onednn = goes_by_onednn(weight)
        self._bias = None if bias is None else bias.detach()
        if self._by_onednn:
            self._weight = _pack(weight, _ROWS) if packed else weight
        else:
            self._weight = weight.t()

    def __call__(self, x_BK: Tensor) -> Tensor:
        if self._by_onednn:
            return _onednn(x_BK, self._weight, self._bias, "none", [], "")
        if self._bias is None:
            return torch.mm(x_BK, self._weight)
        return torch.addmm(self._bias, x_BK, self._weight)

    def add(self, hidden_BN: Tensor, x_BK: Tensor, group: ProcessGroup | None = None) -> None:
        """Add the linear of ``x_BK`` to ``hidden_BN``, in place; of a row-parallel weight summed over ``group``."""
        if self._bias is not None:
            hidden_BN += self._bias
        if group is None and not self._by_onednn:
            hidden_BN.addmm_(x_BK, self._weight)
            return
        out_BN = _onednn(x_BK, self._weight, None, "none", [], "") if self._by_onednn else x_BK @ self._weight
        if group is not None:
            torch.distributed.all_reduce(out_BN, group=group)
        hidden_BN += out_BN


def goes_by_onednn(weight: Tensor) -> bool:
    """Whether a linear with that weight is faster so."""
    return weight.numel() >= _ONEDNN_FROM and weight.dtype == torch.float32 and weight.device.type == "cpu"


class ByOneDNN(TorchFunctionMode):
    """Sends the products with large weights of modules that run in the block by oneDNN; without a gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul and args[1].dim() == 2 and args[1].stride(0) == 1 and goes_by_onednn(args[1]):
            return _onednn(args[0], args[1].t(), None, "none", [], "")
        if func is functional.linear and not kwargs and goes_by_onednn(args[1]):
            return _onednn(args[0], args[1], args[2] if len(args) > 2 else None, "none", [], "")
        return func(*args, **(kwargs or {}))


class Norm:
    """RMSNorm; on a CPU in four operations: w sqrt(D) x / hypot(|x|, sqrt(D eps)).

    Args:
        norms: one, or one for each of as many vectors beside each other, [.., len(norms), D].
    """

    def __init__(self, *norms: Any) -> None:
        first: RMSNorm = norms[0]
        width = first.weight.shape[-1]
        self._fused = (first.weight.detach(), first.eps) if len(norms) == 1 and first.weight.is_cuda else None
        self._wide = torch.promote_types(first.weight.dtype, torch.float32)
        weight = first.weight if len(norms) == 1 else torch.stack([norm.weight for norm in norms])
        self._weight = weight.detach().to(self._wide) * math.sqrt(width)
        self._eps = torch.tensor(math.sqrt(width * first.eps), dtype=self._wide, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """In the dtype of x, which may be any; ``wide`` gives fp32."""
        if self._fused is not None:
            return rms_norm(x, *self._fused)
        normed = self.wide(x)
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The norm in fp32 or wider."""
        if x.dtype != self._wide:
            x = x.to(self._wide)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._eps)
        return x.div(length).mul_(self._weight)
