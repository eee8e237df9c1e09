"""The three Megatron IndexedDatasets of a split's shard: tokens, lossmask, span; one document a conversation.

Written and read here without megatron.core (importing it costs seconds and half a gigabyte in every process), straight
from the documented layout of the index: ``MMIDIDX\\0\\0``, version u64, dtype code u8, sequence count u64, document
count u64, lengths i32, byte offsets i64, document boundaries i64. A test holds them to megatron.core's own builder.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.files import file_entry, sync
from vpmoe.errors import DataError

SIGNALS = {"tokens": np.int32, "lossmask": np.uint8, "span": np.uint8}
_DTYPE_OF_CODE = {1: np.uint8, 4: np.int32}
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INDEX_CHUNK = 1 << 20  # documents; bounds the memory of writing an index


def file_names(shard: str) -> list[str]:
    """Names of the six files of a shard."""
    return [f"{shard}_{signal}.{suffix}" for signal in SIGNALS for suffix in ("bin", "idx")]


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
            tokens, lossmask, span: ``[sum of lengths]``, as they are stored.
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
            _write_index(index, lengths, SIGNALS[signal])
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
    """A shard as flat arrays, memory-mapped; document d is ``[bounds[d] : bounds[d+1]]`` of each.

    Attributes:
        bounds: int64 ``[documents + 1]``.
        tokens, lossmask, span: int32 / uint8 / uint8 ``[bounds[-1]]``.
    """

    bounds: NDArray[np.int64]
    tokens: NDArray[np.int32]
    lossmask: NDArray[np.uint8]
    span: NDArray[np.uint8]

    @property
    def documents(self) -> int:
        """Number of conversations."""
        return len(self.bounds) - 1


def read_triple(folder: Path, shard: str) -> Triple:
    """Open the triple of ``shard`` in ``folder``.

    Raises:
        DataError: a file is missing or damaged, or the three disagree on the documents' lengths.
    """
    bounds = np.zeros(0, dtype=np.int64)
    values: dict[str, NDArray[Any]] = {}
    for signal, dtype in SIGNALS.items():
        lengths = _read_index(folder / f"{shard}_{signal}.idx", dtype)
        own = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        bounds = bounds if values else own
        if not np.array_equal(own, bounds):
            place = "another number of documents"
            if len(own) == len(bounds):
                place = f"another length of document {int(np.flatnonzero(own != bounds)[0]) - 1}"
            raise _damaged(folder / shard, f"{signal} and tokens disagree: {place}")
        values[signal] = _read_values(folder / f"{shard}_{signal}.bin", dtype, int(own[-1]))
    return Triple(bounds, **values)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(what, source=str(path), remedy="rebuild the dataset with --overwrite")


def _write_index(path: Path, lengths: NDArray[np.int32], dtype: type[np.integer]) -> None:
    code = next(code for code, known in _DTYPE_OF_CODE.items() if known is dtype)
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        stream.write(lengths.data)
        offset = 0
        for begin in range(0, len(lengths), _INDEX_CHUNK):
            ends = offset + np.cumsum(lengths[begin : begin + _INDEX_CHUNK], dtype=np.int64) * np.dtype(dtype).itemsize
            stream.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).data)
            offset = int(ends[-1])
        for begin in range(0, len(lengths) + 1, _INDEX_CHUNK):
            stream.write(np.arange(begin, min(begin + _INDEX_CHUNK, len(lengths) + 1), dtype=np.int64).data)


def _read_index(path: Path, dtype: type[np.integer]) -> NDArray[np.int32]:
    if not path.is_file():
        raise _damaged(path, "an index file is missing")
    raw = path.read_bytes()
    if len(raw) < _HEADER.size:
        raise _damaged(path, f"the index has only {len(raw)} bytes")
    magic, version, code, sequences, documents = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != 1 or _DTYPE_OF_CODE.get(code) is not dtype:
        what = f"not an index of {dtype.__name__} (magic {magic!r}, version {version}, dtype code {code})"
        raise _damaged(path, what)
    expected = _HEADER.size + sequences * (4 + 8) + documents * 8
    if len(raw) != expected:
        raise _damaged(path, f"the index has {len(raw)} bytes, its header asks for {expected}")
    lengths = np.frombuffer(raw, np.int32, sequences, _HEADER.size)
    offsets = np.frombuffer(raw, np.int64, sequences, _HEADER.size + 4 * sequences)
    boundaries = np.frombuffer(raw, np.int64, documents, _HEADER.size + 12 * sequences)
    packed = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * np.dtype(dtype).itemsize
    if (sequences and (offsets != packed).any()) or not np.array_equal(boundaries, np.arange(sequences + 1)):
        raise _damaged(path, "the index does not describe one document a conversation")
    return lengths


def _read_values(path: Path, dtype: type[np.integer], count: int) -> NDArray[Any]:
    if not path.is_file():
        raise _damaged(path, "a data file is missing")
    size, expected = path.stat().st_size, count * np.dtype(dtype).itemsize
    if size != expected:
        raise _damaged(path, f"the file has {size} bytes, its index asks for {expected}")
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)
