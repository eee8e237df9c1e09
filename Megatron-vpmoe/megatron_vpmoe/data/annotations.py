"""Annotations: what a batch carries beside its core, named and declared; all else follows from the declaration.

A teacher's ids and log-probabilities, log-probabilities of a reference or of the sampler, advantages, rewards, groups,
pairs, the version of the weights that sampled: each is an array a document, and lies in the batch beside its tokens.

Shapes: b rows, s positions, L tokens of a document, d the most documents of a row in the batch, K entries a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.errors import DataError

if TYPE_CHECKING:
    from megatron_vpmoe.data.batch import Document


class Late(Mapping[str, "NDArray[Any]"]):
    """A document's annotations, of which a teacher's records are expanded once one of them is asked for.

    Args:
        plain: those that are there.
        late: names of the others.
        expand: gives the others; called once at most.
    """

    def __init__(
        self,
        plain: Mapping[str, NDArray[Any]],
        late: Sequence[Annotation],
        expand: Callable[[], Mapping[str, NDArray[Any]]],
    ) -> None:
        self._found, self._late, self._expand = dict(plain), [one.name for one in late], expand

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name in self._late and name not in self._found:
            self._found.update(self._expand())
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._found, *self._late]))

    def __len__(self) -> int:
        return len({*self._found, *self._late})


def of_document(annotation: Annotation, document: Document, source: str) -> NDArray[Any]:
    """A document's array, found to be as declared.

    Raises:
        DataError: it is absent, or of another dtype or shape.
    """
    values, shape = document.annotations.get(annotation.name), annotation.shape(len(document.tokens))
    if values is None:
        raise DataError(
            f"a document lacks the annotation {annotation.name!r}",
            source=source,
            remedy="annotate every document of the source, or declare no such annotation",
        )
    if values.shape != shape or values.dtype != annotation.dtype:
        raise DataError(
            f"the annotation {annotation.name!r} of a document of {len(document.tokens)} tokens is {values.dtype} "
            f"{list(values.shape)}, declared as {annotation.dtype} {list(shape)}",
            source=source,
            remedy="annotate with what is declared",
        )
    return values


def laid_out(
    declared: Sequence[Annotation], rows: Sequence[Sequence[Document]], seq_length: int, sample_ids: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """The annotations of documents that share rows, each as its declaration says; zero where no document is.

    Raises:
        DataError: a document's array is absent or not as declared.
    """
    most = max((len(documents) for documents in rows), default=0) or 1  # of padding too a value can be asked for
    found = {}
    for annotation in declared:
        columns = (most,) if annotation.per == "document" else annotation.shape(seq_length)
        array = found[annotation.name] = np.zeros((len(rows), *columns), annotation.dtype)
        for row, documents in enumerate(rows):
            start = 0
            for number, document in enumerate(documents):
                values = of_document(annotation, document, f"sample {sample_ids[row]}, document {number}")
                end = start + len(document.tokens)
                if annotation.per == "document":
                    array[row, number] = values
                else:
                    array[row, start : end - 1] = values[:-1]
                start = end
    return found
