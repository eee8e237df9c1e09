"""Updated weights on their way to all ranks while others are still being updated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from megatron_vpmoe.runtime.sharded_data_parallel import BucketGroup, Piece


class Gathering:
    """Sends each bucket as soon as this rank's pieces of it, and the buckets before it, are updated.

    Args:
        buckets: of the model, in the order in which they are sent: the same on every rank.
    """

    def __init__(self, buckets: Sequence[BucketGroup]) -> None:
        self._buckets = buckets
        self._bucket_of = {param: number for number, bucket in enumerate(buckets) for param in bucket.params}
        self._counts = [len(bucket.pieces) for bucket in buckets]
        self.begin()

    def begin(self) -> None:
        """Nothing is updated yet."""
        self._left, self._next = list(self._counts), 0

    def updated(self, pieces: Iterable[Piece]) -> None:
        """These are; a collective in so far as it sends."""
        for piece in pieces:
            if (number := self._bucket_of.get(piece.param)) is not None:
                self._left[number] -= 1
        while self._next < len(self._buckets) and not self._left[self._next]:
            self._buckets[self._next].start_gather()
            self._next += 1

    def finish(self) -> None:
        """Wait until everybody's are here."""
        assert self._next == len(self._buckets), "a bucket has pieces that no optimizer updates"
        for bucket in self._buckets:
            bucket.finish_gather()


def own_pieces(
    params: Sequence[torch.nn.Parameter], buckets: Sequence[BucketGroup], group: dist.ProcessGroup
) -> list[Piece]:
    """What this rank updates of the parameters: its slices of the buckets, or everything where there are none.

    Raises:
        ValueError: there are none, and several ranks.
    """
    if buckets:
        wanted = set(params)
        return [piece for bucket in buckets for piece in bucket.pieces if piece.param in wanted]
    if group.size() > 1:
        raise ValueError(f"{group.size()} ranks share a model that is not wrapped in ShardedDataParallel")
    return [Piece(param, 0, param.shape[0] if param.ndim else 1) for param in params]
