"""A teacher that is served elsewhere: it is asked about every document of a step at once, before the update.

Who speaks to it is named in the configuration and imported (``training/frozen.py``); here its answers become
annotations of batches, on all ranks together.

Shapes: b rows, s positions, N supervised positions of a document, n of a batch, K ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from megatron_vpmoe.annotation import IS_SAMPLED
from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.runtime.device import current_device
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.sources.reference import asked_of_teacher, laid_over
from megatron_vpmoe.teacher_records import Records


class Passage(NamedTuple):
    """A document as a batch has it, in the ids of its dataset.

    Attributes:
        tokens: int64 [L].
        positions: int64 [N], ascending: the successors of these tokens are asked for.
        labels: int64 [N], whose log-probability is asked for as well.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]


class Server(Protocol):
    """Who speaks to a served teacher."""

    def ask(self, passage: Passage) -> Future[Records]:
        """What the teacher says of each position, in the dataset's ids; of each record all K are filled.

        The future may end in a :class:`VpmoeError`: it cannot be reached, or what it says cannot be used.
        """
        ...

    def close(self) -> None:
        """Leave what is under way."""
        ...


class Served:
    """See ``Annotator``: with a teacher's ids and their companions, or the log-probability of the label alone.

    Asked are supervised positions, of answers beside an anchor those alone that were sampled. Ranks that hold parts of
    one model have the same batches: the first of them asks and tells the others.

    Args:
        server: is asked.
        top_k: ids a token; 0: only the log-probability of the label is asked for.
    """

    name = "teacher"

    def __init__(self, server: Server, top_k: int) -> None:
        self._server, self._top_k, self._stop = server, top_k, StopRequest()
        self.annotations = asked_of_teacher(top_k, 1.0)

    def heed(self, stop: StopRequest) -> None:
        """See ``Annotator``."""
        self._stop = stop

    def close(self) -> None:
        """See ``Annotator``."""
        self._server.close()

    def __call__(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """See ``Annotator``; a collective, which also ends together where one rank's server does not answer."""
        masks = [_asked(batch) for batch in batches]
        source = parallel_state.get_model_parallel_src_rank()
        group = cast(dist.ProcessGroup, parallel_state.get_model_parallel_group())
        asks = dist.get_rank() == source
        passages = [each for batch, mask in zip(batches, masks, strict=True) for each in _passages(batch, mask) if asks]
        said = self._stop.results([self._server.ask(each) for each in passages])
        counts = [int(mask.sum()) for mask in masks]
        found = []
        for place, declared in enumerate(self.annotations):
            dtype = getattr(torch, declared.dtype)
            values = torch.empty(*declared.shape(sum(counts)), dtype=dtype)
            if said:
                # Of the label alone it is the last of a record's three.
                parts = [records[place - len(self.annotations)] for records in said]
                values = torch.from_numpy(np.concatenate(parts)).to(dtype)
            if dist.get_world_size(group) > 1:
                values = values.to(current_device())
                dist.broadcast(values, source, group)
            found.append(values.cpu().split(counts))
        return [
            laid_over(mask, self.annotations, of_batch)
            for mask, of_batch in zip(masks, zip(*found, strict=True), strict=True)
        ]


def _asked(batch: Batch) -> Tensor:
    """Bool [b, s]: supervised positions, but for those of an anchor."""
    if IS_SAMPLED.name not in batch.annotations:
        return batch.loss_mask
    return batch.loss_mask & batch.per_token(IS_SAMPLED.name).bool()


def _passages(batch: Batch, mask: Tensor) -> Iterator[Passage]:
    """The documents in which the mask holds somewhere, row by row."""
    for tokens, labels, document_id, asked in zip(
        batch.tokens.numpy(), batch.labels.numpy(), batch.document_id.numpy(), mask.numpy(), strict=True
    ):
        for number in range(document_id.max() + 1):
            own = document_id == number
            positions = np.flatnonzero(asked[own])
            if len(positions):
                yield Passage(tokens[own], positions, labels[own][positions])
