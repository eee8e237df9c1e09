"""The three Megatron IndexedDatasets of a split's shard: tokens, lossmask, span; one document a conversation.

Written and read here without megatron.core (importing it costs seconds and half a gigabyte in every process), straight
from the documented layout of the index: ``MMIDIDX\\0\\0``, version u64, dtype code u8, sequence count u64, document
count u64, lengths i32, byte offsets i64, document boundaries i64. A test holds them to megatron.core's own builder.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.files import file_entry, sync

REBUILD = "rebuild the dataset (--overwrite), or copy it again if it was copied"
SIGNALS = {"tokens": np.int32, "lossmask": np.uint8, "span": np.uint8}
_DTYPE_OF_CODE = {1: np.uint8, 4: np.int32, 5: np.int64, 7: np.float32}
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
INDEX_CHUNK = 1 << 20  # documents; bounds the memory of writing and reading an index
PART_TOKENS, _PART_DOCUMENTS = 1 << 20, 1 << 18


def file_names(shard: str, annotations: Sequence[Annotation] = ()) -> list[str]:
    """Names of the six files of a shard, and of two for each annotation."""
    parts = [*SIGNALS, *(annotation.name for annotation in annotations)]
    return [f"{shard}_{part}.{suffix}" for part in parts for suffix in ("bin", "idx")]


class TripleWriter:
    """Writes aligned documents into ``<prefix>_{tokens,lossmask,span}.{bin,idx}``, in place of any that are there.

    Memory: 4 bytes a document until :meth:`close`.
    """

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._streams = {signal: self._path(signal, "bin").open("wb") for signal in SIGNALS}
        self._hashes = {signal: hashlib.sha256() for signal in SIGNALS}
        self._lengths: list[NDArray[np.int32]] = []

    def add(
        self,
        tokens: NDArray[np.int32],
        lossmask: NDArray[np.uint8],
        span: NDArray[np.uint8],
        lengths: NDArray[np.integer],
    ) -> None:
        """Append documents that lie one behind the other in three aligned arrays.

        Args:
            tokens: ``[sum of lengths]``, as they are stored.
            lossmask: the same of the mask.
            span: the same of the spans.
            lengths: ``[documents]``, tokens of each.
        """
        for signal, values in zip(SIGNALS, (tokens, lossmask, span), strict=True):
            content = np.ascontiguousarray(values, SIGNALS[signal]).data
            self._streams[signal].write(content)
            self._hashes[signal].update(content)
        self._lengths.append(np.asarray(lengths, np.int32))

    def close(self) -> dict[str, dict[str, Any]]:
        """Write the indices and make all six files durable; returns the bytes and sha256 of each by name."""
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        files = {}
        for signal, stream in self._streams.items():
            stream.close()
            data, index = self._path(signal, "bin"), self._path(signal, "idx")
            write_index(index, lengths, SIGNALS[signal])
            files[data.name] = {"bytes": data.stat().st_size, "sha256": self._hashes[signal].hexdigest()}
            files[index.name] = file_entry(index)
            sync(data)
            sync(index)
        sync(self._prefix.parent)
        return files

    def _path(self, signal: str, suffix: str) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}_{signal}.{suffix}")


@dataclass(frozen=True, slots=True)
class Triple:
    """A shard as flat arrays, memory-mapped, index and all; or some documents of it that lie one behind the other.

    Attributes:
        starts, lengths: int64, int32 ``[documents]``; where each document begins in the flat arrays, and its tokens.
        tokens, lossmask, span: int32 / uint8 / uint8 ``[sum of lengths]``.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    tokens: NDArray[np.int32]
    lossmask: NDArray[np.uint8]
    span: NDArray[np.uint8]

    @property
    def documents(self) -> int:
        """Number of conversations."""
        return len(self.lengths)

    def place(self, document: int) -> slice:
        """Where a document lies in the flat arrays."""
        begin = int(self.starts[document])
        return slice(begin, begin + int(self.lengths[document]))

    def parts(self, group: int = 1) -> Iterator[Triple]:
        """All documents in their order, about a million tokens at a time, so that arrays over a part stay small.

        Args:
            group: neighbouring documents that stay together.
        """
        first = 0
        while first < self.documents:
            starts = np.asarray(self.starts[first : first + _PART_DOCUMENTS])
            whole = int(np.searchsorted(starts, starts[0] + PART_TOKENS, side="right")) - 1
            end = min(first + max(whole // group, 1) * group, self.documents)
            flat = slice(int(starts[0]), self.place(end - 1).stop)
            own = starts[: end - first] - starts[0], np.asarray(self.lengths[first:end])
            yield Triple(*own, self.tokens[flat], self.lossmask[flat], self.span[flat])
            first = end


def read_triple(folder: Path, shard: str) -> Triple:
    """Open the triple of ``shard`` in ``folder``; memory-mapped, whatever its size.

    Raises:
        DataError: a file is missing or damaged, or the three disagree on the documents' lengths.
    """
    values: dict[str, NDArray[Any]] = {}
    lengths, starts = np.empty(0, np.int32), np.empty(0, np.int64)
    for signal, dtype in SIGNALS.items():
        own, starts, total = read_index(folder / f"{shard}_{signal}.idx", dtype)
        lengths = lengths if values else own
        if len(own) != len(lengths):
            raise damaged(folder / shard, f"{signal} and tokens disagree: another number of documents")
        for begin in range(0, len(own), INDEX_CHUNK):
            chunk = slice(begin, begin + INDEX_CHUNK)
            if (other := np.flatnonzero(own[chunk] != lengths[chunk])).size:
                what = f"{signal} and tokens disagree: another length of document {begin + int(other[0])}"
                raise damaged(folder / shard, what)
        values[signal] = read_values(folder / f"{shard}_{signal}.bin", dtype, total)
    # The offsets of a signal of one byte are counted in tokens.
    return Triple(starts, lengths, **values)


def damaged(path: Path, what: str) -> DataError:
    """The error for a file that does not hold what it has to."""
    return DataError(what, source=str(path), remedy=REBUILD)


def write_index(path: Path, lengths: NDArray[np.int32], dtype: type[np.generic]) -> None:
    """Write the index of arrays of so many entries that lie one behind the other."""
    code = next(code for code, known in _DTYPE_OF_CODE.items() if known is dtype)
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        stream.write(lengths.data)
        offset = 0
        for begin in range(0, len(lengths), INDEX_CHUNK):
            ends = offset + np.cumsum(lengths[begin : begin + INDEX_CHUNK], dtype=np.int64) * np.dtype(dtype).itemsize
            stream.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).data)
            offset = int(ends[-1])
        for begin in range(0, len(lengths) + 1, INDEX_CHUNK):
            stream.write(np.arange(begin, min(begin + INDEX_CHUNK, len(lengths) + 1), dtype=np.int64).data)


def read_index(path: Path, dtype: type[np.generic]) -> tuple[NDArray[np.int32], NDArray[np.int64], int]:
    """Lengths and byte offsets of the documents, memory-mapped, and the tokens of all."""
    if not path.is_file():
        raise damaged(path, "an index file is missing")
    with path.open("rb") as stream:
        raw = stream.read(_HEADER.size)
    if len(raw) < _HEADER.size:
        raise damaged(path, f"the index has only {len(raw)} bytes")
    magic, version, code, sequences, documents = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != 1:
        raise damaged(path, f"not an index of token files (magic {magic!r}, version {version})")
    if (found := _DTYPE_OF_CODE.get(code)) is not dtype:
        raise damaged(path, f"not an index of {dtype.__name__} but of {found.__name__ if found else f'dtype {code}'}")
    size, expected = path.stat().st_size, _HEADER.size + sequences * (4 + 8) + documents * 8
    if size != expected:
        raise damaged(path, f"the index has {size} bytes, its header asks for {expected}")
    lengths = _mapped(path, np.int32, sequences, _HEADER.size)
    offsets = _mapped(path, np.int64, sequences, _HEADER.size + 4 * sequences)
    boundaries = _mapped(path, np.int64, documents, _HEADER.size + 12 * sequences)
    sound, total = documents == sequences + 1 and boundaries[-1] == sequences, 0
    for begin in range(0, sequences if sound else 0, INDEX_CHUNK):
        chunk = slice(begin, begin + INDEX_CHUNK)
        ends = total + np.cumsum(lengths[chunk], dtype=np.int64)
        packed = np.concatenate([[total], ends[:-1]]) * np.dtype(dtype).itemsize
        numbers = np.arange(begin, begin + len(ends))
        sound &= bool((lengths[chunk] >= 0).all() and np.array_equal(offsets[chunk], packed))
        sound &= np.array_equal(boundaries[:-1][chunk], numbers)
        total = int(ends[-1])
    if not sound:
        raise damaged(path, "the index does not describe one document a conversation")
    return lengths, offsets, total


def read_values(path: Path, dtype: type[np.generic], count: int) -> NDArray[Any]:
    """The ``count`` entries of a data file, memory-mapped; raises :class:`DataError` where it is not as long."""
    if not path.is_file():
        raise damaged(path, "a data file is missing")
    size, expected = path.stat().st_size, count * np.dtype(dtype).itemsize
    if size != expected:
        raise damaged(path, f"the file has {size} bytes, its index asks for {expected}")
    return _mapped(path, dtype, count, 0)


def _mapped(path: Path, dtype: type[np.generic], count: int, offset: int) -> NDArray[Any]:
    return np.asarray(np.memmap(path, dtype, mode="r", offset=offset, shape=(count,)) if count else np.empty(0, dtype))
