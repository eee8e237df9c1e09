"""A source with annotations added: what a second model says of each batch, before the update that uses it.

The same annotation may be made ahead of time and stored in a dataset's sidecars (``of_documents``, by the command
``vpmoe data annotate``); an objective does not know which it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import Batch, Document, assemble
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.sources.interface import Batches, Gives, Position, Source, Step


class Annotator(Protocol):
    """Makes annotations of batches. It may call collectives: every rank annotates equally many batches.

    Attributes:
        name: in metrics.
    """

    name: str

    @property
    def annotations(self) -> tuple[Annotation, ...]: ...

    def __call__(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """The annotations of each by name, on the CPU, as their declarations have them in a batch.

        Args:
            batches: of a step, or one that validates; on the CPU.

        Raises:
            Interrupted: on all ranks.
        """
        ...

    def heed(self, stop: StopRequest) -> None:
        """Leave off where a stop is asked for; a collective."""
        ...

    def close(self) -> None:
        """End what it has running."""
        ...


def _annotated(batches: Sequence[Batch], annotator: Annotator) -> list[Batch]:
    return [
        replace(batch, annotations={**batch.annotations, **found})
        for batch, found in zip(batches, annotator(batches), strict=True)
    ]


def _together(gives: Gives, annotator: Annotator) -> tuple[Annotation, ...]:
    """What both declare; raises :class:`ConfigError` where they declare the same."""
    if twice := {one.name for one in gives.annotations} & {one.name for one in annotator.annotations}:
        raise ConfigError(
            f"the data bring {', '.join(sorted(twice))} already, made ahead of time",
            source="training.reference_weights, training.teacher_weights or training.teacher_server",
            remedy="leave it null, or name the dataset that the annotated one was made of",
        )
    return (*gives.annotations, *annotator.annotations)


class Annotated:
    """Another source's steps, annotated by the thread that trains when they are asked for."""

    def __init__(self, source: Source, annotator: Annotator) -> None:
        self._source, self._annotator = source, annotator
        self.annotations = _together(source, annotator)
        self.depends_on_weights = source.depends_on_weights

    def next_step(self) -> Step:
        """See ``Source``."""
        step, began = self._source.next_step(), time.perf_counter()
        batches = _annotated(step.batches, self._annotator)
        seconds = {f"{self._annotator.name}/seconds_scoring": time.perf_counter() - began}
        return step._replace(batches=batches, metrics={**step.metrics, **seconds})

    def resume(self, position: Position, *, source: str, allow_change: bool = False) -> list[str]:
        """See ``Source``."""
        return self._source.resume(position, source=source, allow_change=allow_change)

    def forget(self) -> None:
        """See ``Source``."""
        self._source.forget()

    def close(self) -> None:
        """See ``Source``."""
        self._source.close()
        self._annotator.close()


class AnnotatedBatches:
    """What validates, annotated anew each time that it is iterated."""

    def __init__(self, batches: Batches, annotator: Annotator) -> None:
        self._batches, self._annotator = batches, annotator
        self.annotations = _together(batches, annotator)
        self.depends_on_weights = batches.depends_on_weights

    def __iter__(self) -> Iterator[Batch]:
        # One by one: a whole split with K ids at every position is more than memory holds.
        for batch in self._batches:
            yield from _annotated([batch], self._annotator)


def of_documents(
    documents: Iterable[Document], annotator: Annotator, *, eod_id: int, seq_length: int, rows: int
) -> Iterator[list[dict[str, NDArray[Any]]]]:
    """The annotations of documents, as a dataset stores them: lists of one batch's documents, in their order.

    A row is filled as long as the next document fits. Which documents share a batch follows from where the first one
    begins: gone on with behind a list, the lists are the same.

    Args:
        documents: none longer than ``seq_length``.
        annotator: makes them.
        eod_id: the end-of-document token.
        seq_length: positions of a row.
        rows: of a batch, at most.
    """
    for batch_rows in in_rows(documents, seq_length, rows):
        batch = assemble(batch_rows, seq_length=seq_length, eod_id=eod_id, sample_ids=range(len(batch_rows)))
        found = {name: values.numpy() for name, values in annotator([batch])[0].items()}
        batch_documents = []
        for row, held in enumerate(batch_rows):
            ends = np.cumsum([len(document.tokens) for document in held]).tolist()
            for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                place = {"document": number, "token": slice(start, end)}
                own = {
                    declared.name: found[declared.name][row, place[declared.per]] for declared in annotator.annotations
                }
                batch_documents.append(own)
        yield batch_documents


def in_rows(documents: Iterable[Document], seq_length: int, rows: int) -> Iterator[list[list[Document]]]:
    """Documents in their order, in batches of so many rows, each filled as long as the next one fits."""
    batch, room = [], 0
    for document in documents:
        if len(document.tokens) > room:
            if len(batch) == rows:
                yield batch
                batch = []
            batch.append([])
            room = seq_length
        batch[-1].append(document)
        room -= len(document.tokens)
    if batch:
        yield batch
