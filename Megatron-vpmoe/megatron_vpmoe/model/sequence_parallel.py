"""Sequence parallelism: between attention and feed-forward each tensor-parallel rank keeps its part of the sequence.

Where the parts begin and end is Megatron-Core's: the embedding scatters the sequence, column-parallel linears gather
it, row-parallel ones scatter their sums. A step of a single token cannot be split, so decoding switches it off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron.core.transformer.module import MegatronModule

_FLAGS = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")


@contextlib.contextmanager
def whole_sequences(model: MegatronModule) -> Iterator[None]:
    """Every rank holds every position until the end of the block; for forward passes without a gradient."""
    if not model.config.sequence_parallel:
        yield
        return
    switched = [(owner, flag) for owner in model.modules() for flag in _FLAGS if getattr(owner, flag, None) is True]
    _set([*switched, (model.config, "sequence_parallel")], False)
    try:
        yield
    finally:
        _set([*switched, (model.config, "sequence_parallel")], True)


def _set(places: list[tuple[object, str]], value: bool) -> None:
    for owner, flag in places:
        setattr(owner, flag, value)
