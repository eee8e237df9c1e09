"""A source with annotations added: what a frozen second model says of each batch, before the update that uses it.

The same annotation may be made ahead of time, document by document, and stored in a dataset's sidecars
(``of_documents``, ``token_files.write_annotation``); an objective does not know which it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import Batch, Document, assemble
from megatron_vpmoe.sources.interface import Batches, Position, Source, Step


class Annotator(Protocol):
    """Makes annotations of batches. It may call collectives: every rank annotates equally many batches."""

    @property
    def annotations(self) -> tuple[Annotation, ...]: ...

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The annotations by name, on the CPU, as their declarations have them in a batch.

        Args:
            batch: on the CPU.
        """
        ...


def _annotated(batch: Batch, annotator: Annotator) -> Batch:
    return replace(batch, annotations={**batch.annotations, **annotator(batch)})


class Annotated:
    """Another source's steps, annotated by the thread that trains when they are asked for."""

    def __init__(self, source: Source, annotator: Annotator) -> None:
        self._source, self._annotator = source, annotator
        self.annotations = (*source.annotations, *annotator.annotations)
        self.depends_on_weights = source.depends_on_weights

    def next_step(self) -> Step:
        """See ``Source``."""
        step = self._source.next_step()
        return step._replace(batches=[_annotated(batch, self._annotator) for batch in step.batches])

    def resume(self, position: Position, *, source: str, allow_change: bool = False) -> list[str]:
        """See ``Source``."""
        return self._source.resume(position, source=source, allow_change=allow_change)

    def close(self) -> None:
        """See ``Source``."""
        self._source.close()


class AnnotatedBatches:
    """What validates, annotated anew each time that it is iterated."""

    def __init__(self, batches: Batches, annotator: Annotator) -> None:
        self._batches, self._annotator = batches, annotator
        self.annotations = (*batches.annotations, *annotator.annotations)
        self.depends_on_weights = batches.depends_on_weights

    def __iter__(self) -> Iterator[Batch]:
        return (_annotated(batch, self._annotator) for batch in self._batches)


def of_documents(
    documents: Iterable[Document], annotator: Annotator, *, eod_id: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """The annotations of documents one by one, each in a row of its own, as a dataset stores them."""
    for document in documents:
        batch = assemble([[document]], seq_length=len(document.tokens), eod_id=eod_id, sample_ids=[0])
        # Of a document the batch has [1, L], [1, L, K] or [1, 1].
        whole = {declared.name: declared.shape(len(document.tokens)) for declared in annotator.annotations}
        yield {name: values.numpy().reshape(whole[name]) for name, values in annotator(batch).items()}
