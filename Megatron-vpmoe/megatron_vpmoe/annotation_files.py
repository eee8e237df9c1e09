"""Annotations of a shard, two files each beside its triple: ``<shard>_<name>.{bin,idx}``, laid out as those are."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.files import file_entry, naming, sync
from megatron_vpmoe.teacher_records import TeacherRecords
from megatron_vpmoe.token_files import INDEX_CHUNK, PART_TOKENS, Triple, damaged, read_index, read_values, write_index


class AnnotationWriter:
    """Writes one annotation of a shard, document by document; what was flushed outlives a kill, and is gone on with.

    Memory: 4 bytes a document until :meth:`close`.

    Args:
        folder: of the split.
        shard: its name.
        annotation: the declaration.
        done: the shard's first documents, whose arrays were flushed; what lies behind them goes.
        sizes: a file that outlives a kill with the rest: the entries of each document, until there is an index. None:
            it cannot be gone on with.

    Raises:
        DataError: they are not all there.
    """

    def __init__(
        self, folder: Path, shard: str, annotation: Annotation, done: int = 0, sizes: Path | None = None
    ) -> None:
        self._path, self._dtype = folder / f"{shard}_{annotation.name}.bin", np.dtype(annotation.dtype).type
        self._entries = array("i")
        if done and sizes is not None and sizes.is_file():
            self._entries.frombytes(sizes.read_bytes()[: 4 * done])
        size = sum(self._entries) * np.dtype(self._dtype).itemsize
        there = self._path.stat().st_size if self._path.is_file() else 0
        if len(self._entries) < done or there < size:
            raise damaged(self._path, f"{done} documents were written, and they are not all there any more")
        self._stream = _opened(self._path, size)
        self._sizes = None if sizes is None else _opened(sizes, 4 * done)

    def add(self, values: NDArray[Any]) -> None:
        """Append the next document's, which is as the declaration says."""
        content = np.ascontiguousarray(values, self._dtype)
        with naming(self._path):
            self._stream.write(content.tobytes())
            if self._sizes is not None:
                self._sizes.write(array("i", [content.size]).tobytes())
        self._entries.append(content.size)

    @property
    def bytes(self) -> int:
        """Written so far."""
        return self._stream.tell()

    def flush(self) -> None:
        """Make durable what was added."""
        for stream in filter(None, (self._stream, self._sizes)):
            with naming(self._path):
                stream.flush()
                os.fsync(stream.fileno())

    def close(self) -> dict[str, dict[str, Any]]:
        """Write the index; returns bytes and sha256 of both files by name, durable."""
        self.flush()
        for stream in filter(None, (self._stream, self._sizes)):
            stream.close()
        index = self._path.with_suffix(".idx")
        write_index(index, np.asarray(self._entries, np.int32), self._dtype)
        for path in (index, index.parent):
            sync(path)
        return {path.name: file_entry(path) for path in (self._path, index)}


def _opened(path: Path, size: int) -> IO[bytes]:
    stream = path.open("r+b" if size else "wb")
    stream.truncate(size)
    stream.seek(size)
    return stream


def read_annotation(
    folder: Path, shard: str, annotation: Annotation, lengths: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Open an annotation of a shard, memory-mapped; its layout is held against the declaration.

    Args:
        folder: of the split.
        shard: its name.
        annotation: the declaration.
        lengths: int32 [documents], tokens of each.

    Returns:
        int64 [documents], where each document's entries begin; the entries of all, one behind the other.

    Raises:
        DataError: a file is missing or damaged, of another dtype, or has not an array for each document as declared.
    """
    path, dtype = folder / f"{shard}_{annotation.name}.idx", np.dtype(annotation.dtype).type
    own, offsets, total = read_index(path, dtype)
    if len(own) != len(lengths):
        raise damaged(path, f"{len(own)} documents are annotated with {annotation.name}, there are {len(lengths)}")
    for begin in range(0, len(own), INDEX_CHUNK):
        chunk = slice(begin, begin + INDEX_CHUNK)
        if (other := np.flatnonzero(~annotation.may_have(np.asarray(own[chunk]), np.asarray(lengths[chunk])))).size:
            number = begin + int(other[0])
            what = f"{own[number]} entries of {annotation.name} for the {lengths[number]} tokens of document {number}"
            raise damaged(path, what)
    return offsets // np.dtype(dtype).itemsize, read_values(path.with_suffix(".bin"), dtype, total)


def read_records(
    folder: Path, shard: str, records: TeacherRecords, triple: Triple
) -> Callable[[int], dict[str, NDArray[Any]]]:
    """Open the teacher's records of a shard, memory-mapped.

    Returns:
        document -> its annotations (:meth:`TeacherRecords.of_document`); that raises :class:`DataError` too.

    Raises:
        DataError: as ``read_annotation``.
    """
    starts, values = read_annotation(folder, shard, records.stored, triple.lengths)
    path = folder / f"{shard}_{records.stored.name}.bin"

    def of_document(document: int) -> dict[str, NDArray[Any]]:
        end = int(starts[document + 1]) if document + 1 < len(starts) else len(values)
        source = f"{path}, document {document}"
        return records.of_document(values[int(starts[document]) : end], triple.lossmask[triple.place(document)], source)

    return of_document


def check_annotation(folder: Path, shard: str, annotation: Annotation, lengths: NDArray[np.int32]) -> None:
    """What ``read_annotation`` refuses, and a number that is not finite; raises :class:`DataError`."""
    _, values = read_annotation(folder, shard, annotation, lengths)
    for begin in range(0, len(values), PART_TOKENS):
        if not np.isfinite(values[begin : begin + PART_TOKENS]).all():
            path = folder / f"{shard}_{annotation.name}.bin"
            raise damaged(path, f"{annotation.name} holds a number that is not finite")
