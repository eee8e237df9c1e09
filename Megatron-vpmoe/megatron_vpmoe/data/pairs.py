"""Documents that have to share a row: groups of ``group_size`` neighbours, packed as one unit.

A preference dataset stores document 2i, a chosen conversation, beside 2i + 1, the rejected one; ``group_size`` is 2.
The packer is given the groups' lengths and answers with groups; this file goes there and back. With a ``group_size`` of
1 both ways are the identity.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.errors import DataError


def grouped_lengths(lengths: NDArray[np.int32], group_size: int, *, seq_length: int) -> NDArray[np.int32]:
    """Tokens of each group of ``group_size`` neighbouring documents.

    Args:
        lengths: int32 [n]; tokens of each document.
        group_size: documents of a group, at least 1.
        seq_length: positions of a row, which has to hold a whole group.

    Returns:
        int32 [n / group_size].

    Raises:
        DataError: the documents do not divide into groups, or a group is longer than a row.
    """
    if len(lengths) % group_size:
        raise DataError(
            f"{len(lengths)} documents do not divide into groups of {group_size}",
            source="dataset of grouped documents",
            remedy="rebuild the dataset (--overwrite)",
        )
    sums = lengths.reshape(-1, group_size).sum(axis=1, dtype=np.int64)
    too_long = np.flatnonzero(sums > seq_length)
    if too_long.size:
        raise DataError(
            f"{too_long.size} groups of {group_size} documents are longer than seq_length {seq_length}; "
            f"the first, number {too_long[0]}, has {sums[too_long[0]]} tokens",
            source="dataset of grouped documents",
            remedy=f"set --seq-length {sums.max()} or more, or rebuild with --seq-len {seq_length}",
        )
    return sums.astype(np.int32)


def documents_of(groups: NDArray[np.int64], group_size: int) -> NDArray[np.int64]:
    """The documents of ``groups``, in their order and without a gap; int64 [len(groups) * group_size]."""
    return (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
