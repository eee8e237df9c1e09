"""Weights are finite, or named: the maximum of differences, for one, does not see a nan."""

from __future__ import annotations

from torch import Tensor

from megatron_vpmoe.errors import NonFiniteError

_REMEDY = "fetch or make these weights again; a model that has diverged is of no use to anything"


def require_finite(tensor: Tensor, name: str, *, source: str | None = None, remedy: str = _REMEDY) -> Tensor:
    """``tensor`` itself, held to be finite.

    Raises:
        NonFiniteError: a value is nan or infinite; names the tensor and counts them.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        what = f"{name}: {count} of {tensor.numel()} values are not finite"
        raise NonFiniteError(what, source=source, remedy=remedy)
    return tensor
